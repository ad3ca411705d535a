"""`python -m bench.gpu_check`: see `bench.gpu_check`."""

from bench.gpu_check.command import main

if __name__ == "__main__":
    raise SystemExit(main())
