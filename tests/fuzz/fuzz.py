#!/usr/bin/env python3
"""Coverage-guided fuzzing of everything in vmf that reads what others wrote (atheris, libFuzzer).

    python tests/fuzz/fuzz.py                      all targets, one after the other, half an hour together
    python tests/fuzz/fuzz.py --minutes 5 talk     only some, for so long
    python tests/fuzz/fuzz.py --replay FILE talk   one input, as it was found
    python tests/fuzz/fuzz.py --steady             replay the corpora without atheris: does anything grow?
    python tests/fuzz/fuzz.py --list

Needs atheris (`pip install ".[fuzz]"`). Corpora are kept in `--corpus` (made from the golden vectors and from what
`fuzzing/` builds; nothing is downloaded), findings in `--findings`. A finding is mended, and its input, shortened, goes
to `fuzzing/regressions.py`, from where the ordinary tests replay it.

Each target runs in a process of its own, so that a crash, a hang (an input that takes `HANG_S`) or a leak
(`RSS_LIMIT_MIB`) ends only that target and is told. The table shows inputs, coverage and memory: the resident set
when the seeds had been read and at the end, and the objects that Python had allocated after 512 inputs and last.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
HANG_S = 20
RSS_LIMIT_MIB = 1500
INSTRUMENTED = ("vmf", "vmf_device_pc", "vmf_transport_tls", "vmf_cpu_unicorn")


def one(name: str, arguments: list[str]) -> None:
    """Fuzz one target in this process; does not return."""
    import logging

    import atheris

    logging.disable(logging.CRITICAL)
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        import fuzzing

        target = fuzzing.targets()[name]
        corpus = Path(arguments[0])
        for number, seed in enumerate(target.seeds()):
            (corpus / f"seed-{number:04}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *arguments], counted(target.run))
    atheris.Fuzz()


def counted(run: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """The same, and at every power of two inputs the number of objects that Python has allocated is written down.

    libFuzzer's own tables grow with the number of inputs, so the resident set alone does not tell whether vmf's do.
    """
    inputs = 0

    def one_more(data: bytes) -> None:
        nonlocal inputs
        run(data)
        inputs += 1
        if inputs >= 512 and not inputs & (inputs - 1):
            gc.collect()
            print(f"allocated {sys.getallocatedblocks()}", file=sys.stderr, flush=True)

    return one_more


def steady(name: str, corpus: Path, seconds: float = 6.0) -> tuple[int, int, int]:
    """Replay a corpus over and over in this process: inputs, and Python's allocated objects before and after.

    atheris and libFuzzer keep tables of what they have seen; here nothing but vmf can grow.
    """
    import fuzzing

    target = fuzzing.targets()[name]
    kept = sorted(corpus.iterdir()) if corpus.is_dir() else []
    inputs = [path.read_bytes() for path in kept] or list(target.seeds())
    for data in inputs:
        target.run(data)
    gc.collect()
    before, count, end = sys.getallocatedblocks(), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for data in inputs:
            target.run(data)
            count += 1
            if time.monotonic() >= end:
                break
    gc.collect()
    return count, before, sys.getallocatedblocks()


def figures(log: str) -> dict[str, int]:
    """Inputs, coverage, corpus and resident MiB from what libFuzzer wrote."""
    found = {}
    for line in log.splitlines():
        if match := re.match(r"#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+) corp: (\d+)\S* .*rss: (\d+)Mb", line):
            inputs, word, coverage, features, corpus, rss = match.groups()
            found |= {"inputs": int(inputs), "coverage": int(coverage), "features": int(features)}
            found |= {"corpus": int(corpus), "rss": int(rss)}
            if word == "INITED":
                found["rss at start"] = int(rss)
        elif line.startswith("allocated "):
            found["objects"] = int(line.split()[1])
            found.setdefault("objects at start", found["objects"])
    return found


def run(name: str, seconds: float, length: int, corpus: Path, findings: Path) -> dict[str, int | str]:
    """One target in a process of its own."""
    mine = corpus / name
    mine.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, str(HERE / "fuzz.py"), "--one", name, str(mine), f"-max_total_time={max(1, round(seconds))}",
        f"-timeout={HANG_S}", f"-rss_limit_mb={RSS_LIMIT_MIB}", f"-max_len={length}",
        f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1", "-verbosity=1", "-detect_leaks=0",
    ]  # fmt: skip
    began = time.monotonic()
    log = findings / f"{name}.log"
    with log.open("wb") as output:
        status = subprocess.run(command, stdout=output, stderr=output, check=False).returncode
    text = log.read_text(errors="replace")
    result: dict[str, int | str] = {"target": name, **figures(text)}
    result["seconds"] = round(time.monotonic() - began)
    result["end"] = "no finding" if status == 0 else f"FINDING, see {log}"
    return result


def main() -> int:
    if sys.argv[1:2] == ["--steady-one"]:
        import logging

        logging.disable(logging.CRITICAL)
        count, before, after = steady(sys.argv[2], Path(sys.argv[3]))
        print(f"| {sys.argv[2]} | {count} | {before} | {after} |", flush=True)
        return 0
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], sys.argv[3:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--minutes", type=float, default=30.0, help="of all targets together (default: 30)")
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vmf-fuzz"
    parser.add_argument("--corpus", type=Path, default=base / "corpus")
    parser.add_argument("--findings", type=Path, default=base / "findings")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--steady", action="store_true")
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args()
    import fuzzing

    known = fuzzing.targets()
    if chosen.list:
        for target in known.values():
            print(f"{target.name:<14} {(target.run.__doc__ or '').splitlines()[0]}")
        return 0
    if odd := [name for name in chosen.targets if name not in known]:
        parser.error(f"there is no target {odd[0]!r}; --list shows them")
    picked = [known[name] for name in chosen.targets or known]
    if chosen.replay:
        picked[0].run(chosen.replay.read_bytes())
        return 0
    if chosen.steady:
        print("| target | inputs replayed | objects before | after |\n|---|---|---|---|", flush=True)
        command = [sys.executable, str(HERE / "fuzz.py"), "--steady-one"]
        done = [
            subprocess.run([*command, target.name, str(chosen.corpus / target.name)], check=False) for target in picked
        ]
        return max(each.returncode for each in done)
    shares = sum(target.share for target in picked)
    print(
        "| target | inputs | seconds | coverage | features | corpus | RSS MiB, start | end | objects, start | end | |"
    )
    print("|---" * 11 + "|", flush=True)
    inputs = seconds = 0
    failed = False
    for target in picked:
        wanted = chosen.minutes * 60 * target.share / shares
        row = run(target.name, wanted, target.max_length, chosen.corpus, chosen.findings)
        columns = ("target", "inputs", "seconds", "coverage", "features", "corpus", "rss at start", "rss")
        columns += ("objects at start", "objects", "end")
        print("| " + " | ".join(str(row.get(column, "?")) for column in columns) + " |", flush=True)
        inputs += int(row.get("inputs", 0))
        seconds += int(row["seconds"])
        failed |= row["end"] != "no finding"
    print(f"\n{inputs} inputs in {seconds} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
