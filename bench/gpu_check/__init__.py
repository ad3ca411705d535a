"""Everything that only a GPU can show, in one command: `make gpu-check`, or `python -m bench.gpu_check`.

Parts, each of which may be run alone (`--parts build,operators`) and ends within ten minutes:

build      compiles kronfac with nvcc, without a network, into a folder that the other parts import it from
operators  tests/ops on CUDA tensors against float64 on the CPU, and tests/cuda
kfac       tests/optim/test_cuda.py
sanitizer  compute-sanitizer's memcheck and racecheck over small cases of all operators
bench      times against torch by CUDA events, both sides in one process, the error beside the time, and the share of
           what this GPU was measured to do at most; K-FAC steps beside SGD steps

Each part leaves a record, --state DIR/<part>.json. What all records of the same sources and the same device say is
joined in --out DIR/<device>-<date>.json and .md. A part that fails is recorded with the reason; what was not measured
is in no record.

Exit status: 0 all parts ran and found nothing wrong, 1 one did not, 2 there is no GPU, no CUDA in torch, or bad usage.
Bars that a time misses are named in the table; --bars makes them count as failures.
"""
