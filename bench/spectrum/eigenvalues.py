"""The top eigenvalues: the peers' options are swept for their best certified setting, which is raced with kronfac."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from bench.spectrum.problem import Certificate, Problem, certify
from bench.spectrum.sides import PEERS, GivenUpError, Meter, Pairs, Peer, Setting, kronfac_pairs
from kronfac.cli.bench.measure import Clock, by_turns, ratio

Say = Callable[[str], None]
ALL_COPIES = "kronfac, all copies"
"""With the search for further copies of repeated eigenvalues, which no peer has."""


def sweep(problem: Problem, k: int, tolerance: float, limit: float, clock: Clock, say: Say) -> dict[str, Any]:
    """Try each peer's settings.

    Args:
        problem: the Hessian.
        k: eigenpairs.
        tolerance: of the certificate.
        limit: seconds after which a run is given up, before one is certified; then the time of the fastest that is.
        clock: seconds.
        say: prints.

    Returns:
        By peer: the fastest certified run as {"method", "setting", "seconds"}; where there is none {"given_up": the
        longest time that a run was given}.
    """
    exact = problem.exact_eigenvalues(k)
    best: dict[str, Any] = {}
    for peer in PEERS:
        if not peer.present():
            say(f"{peer.name}: not measured: not installed")
            continue
        best[peer.name] = {"given_up": 0.0}
        for name, method in peer.methods.items():
            for family in method.families(k):
                for setting in family:
                    allowed = best[peer.name].get("seconds", limit)
                    seconds, products, found = _timed(problem, peer, name, k, setting, allowed, clock)
                    if isinstance(found, str):
                        say(f"{peer.name} {name} {_text(setting)}: {found}")
                        if "given_up" in best[peer.name]:
                            best[peer.name]["given_up"] = max(best[peer.name]["given_up"], seconds)
                        break
                    certificate = certify(problem, exact, found.values, found.vectors, tolerance)
                    say(f"{peer.name} {name} {_text(setting)}: {_line(seconds, products, certificate, tolerance)}")
                    if certificate.holds(tolerance):
                        if seconds < allowed:
                            best[peer.name] = {"method": name, "setting": setting, "seconds": seconds}
                        break
    return best


def race(
    problem: Problem, k: int, tolerance: float, settings: dict[str, Any], rounds: int, clock: Clock, say: Say
) -> dict[str, Any]:
    """Time kronfac with and without its search for copies, and each peer's best setting, by turns, and certify each.

    Args:
        problem: the Hessian.
        k: eigenpairs.
        tolerance: of the certificate, and what kronfac is asked for.
        settings: by peer, as `sweep` returns them.
        rounds: of each side.
        clock: seconds.
        say: prints.

    Returns:
        By side: seconds, products, certificate, ratio to kronfac.
    """
    exact = problem.exact_eigenvalues(k)
    result: dict[str, Any] = {}
    own: dict[str, Setting] = {"kronfac": {"tol": tolerance}, ALL_COPIES: {"tol": tolerance, "multiplicity": True}}
    calls: dict[str, Callable[[Meter], Pairs]] = {}
    for name, options in own.items():
        calls[name] = lambda meter, options=options: kronfac_pairs(problem, k, options, meter)  # type: ignore[misc]
    for peer in PEERS:
        chosen = settings.get(peer.name)
        if not peer.present() or chosen is None:
            say(f"{peer.name}: not measured: {'not in the settings' if peer.present() else 'not installed'}")
            continue
        if "given_up" in chosen:
            say(f"{peer.name}: no certified setting; runs were given up after {chosen['given_up']:.0f} s")
            result[peer.name] = {"certified": False, "given_up": chosen["given_up"]}
            continue
        solve = peer.methods[chosen["method"]].solve

        def call(meter: Meter, solve: Any = solve, setting: Setting = chosen["setting"]) -> Pairs:
            pairs: Pairs = solve(problem, k, setting, meter)
            return pairs

        calls[peer.name] = call
    # Each is called once before it is timed: what it returns then is certified, the same seed gives the same later.
    certificates: dict[str, Certificate] = {}
    products: dict[str, int] = {}
    for name, side in calls.items():
        meter = Meter()
        found = side(meter)
        certificates[name], products[name] = certify(problem, exact, found.values, found.vectors), meter.products
    timings = by_turns(
        {name: lambda side=side: side(Meter()) for name, side in calls.items()}, rounds=rounds, clock=clock
    )
    for name, timing in timings.items():
        against = ratio(timing, timings["kronfac"])
        setting = own[name] if name in own else settings[name]["setting"]
        result[name] = {
            "seconds": timing.median,
            "samples": timing.samples,
            "products": products[name],
            "certificate": asdict(certificates[name]),
            "certified": certificates[name].holds(tolerance),
            "setting": setting,
            "ratio": against.value,
            "quartiles": (against.low, against.high),
        }
        line = _line(timing.median, products[name], certificates[name], tolerance)
        say(f"top {k} {name:20} {line}  {against.value:.2f}x ({against.low:.2f}-{against.high:.2f})  {_text(setting)}")
    return result


def _timed(
    problem: Problem, peer: Peer, method: str, k: int, setting: Setting, allowed: float, clock: Clock
) -> tuple[float, int, Pairs | str]:
    start = clock()
    meter = Meter(start + allowed, clock)
    try:
        found: Pairs | str = peer.methods[method].solve(problem, k, setting, meter)
    except GivenUpError as reason:
        found = f"{reason}, {allowed:.1f} s"
    except (RuntimeError, ValueError) as error:  # a peer may fail; its other settings may not
        found = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return clock() - start, meter.products, found


def _line(seconds: float, products: int, certificate: Certificate, tolerance: float) -> str:
    mark = "certified" if certificate.holds(tolerance) else "NOT certified"
    residual = "too large" if certificate.residual is None else f"{certificate.residual:.1e}"
    return f"{seconds:7.2f} s  {products:5d} products  residual {residual}  error {certificate.error:.1e}  {mark}"


def _text(setting: Setting) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())
