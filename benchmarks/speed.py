"""Speed, memory and wire bytes: `python -m benchmarks.speed spectrum|check|wire`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from benchmarks.spectrum import spectrum_command
from benchmarks.timing import RESULTS, machine, table, write_results
from benchmarks.whole_process import check_times, wire, written_pair


def check_command(args: argparse.Namespace) -> None:
    """`projaudit check` of a LLaVA-1.5-7B-sized pair on disk: seconds by stage, peak memory."""
    before = machine(torch.device(args.device))
    with written_pair() as (tuned, base):
        found = check_times(tuned, base, args.rounds, args.device)
    stages = [{"stage": name, "seconds": f"{s:.2f}"} for name, s in found["stages_s"].items()]
    text = [
        "# `projaudit check` of a LLaVA-1.5-7B-sized pair, as a whole process",
        "",
        f"{before['cpu']}, {before['cores']} cores, {before['device']}, torch {before['torch']}, "
        f"load average {before['load_average'][0]:.1f} before. Two sparse checkpoints of 14 GB, "
        f"the projectors' 84 MB in them real. Medians of {args.rounds} interleaved rounds.",
        "",
        f"- imports alone: {found['imports_s']:.2f} s; whole check: {found['check_s']:.2f} s; "
        f"**beyond the imports: {found['check_beyond_imports_s']:.2f} s** (aim: 6)",
        f"- torch, bytes and the two decompositions alone: {found['least_s']:.2f} s; the check up "
        f"to its spectra: {found['spectral_part_s']:.2f} s, "
        f"**{found['spectral_part_over_least']:.2f}×** (aim: 1.5)",
        f"- peak memory: {found['check_peak_bytes'] / 2**20:.0f} MiB, imports alone "
        f"{found['import_peak_bytes'] / 2**20:.0f} MiB; **growth "
        f"{found['peak_growth_over_fp32_pair']:.2f}×** the fp32 pair of projectors (aim: 3)",
        "",
        table(stages, ["stage", "seconds"]),
    ]
    write_results(args.output, "speed-check", text, {"machine": before, **found})


def wire_command(args: argparse.Namespace) -> None:
    """Bytes and requests of a check of that pair through a local Hub."""
    before = machine(torch.device("cpu"))
    with written_pair() as (tuned, base):
        found = wire(tuned, base)
    rows = [
        {
            "run": run,
            "wire bytes": f"{found[run]['wire_bytes']:,}",
            "over the projectors' bytes": f"{found[run]['over_projector_bytes']:.4f}",
            "requests": found[run]["requests"],
        }
        for run in ("first", "second")
    ]
    text = [
        "# Wire bytes of `projaudit check org/tuned --base org/base`",
        "",
        f"Two repositories of 14 GB in one file each, on a local Hub; both projectors together "
        f"hold {found['projector_bytes']:,} bytes (aim: 1.05× plus headers).",
        "",
        table(rows, list(rows[0])),
    ]
    write_results(args.output, "speed-wire", text, {"machine": before, **found})


def parser() -> argparse.ArgumentParser:
    """One subcommand per table."""
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    commands = top.add_subparsers(required=True)
    spectrum = commands.add_parser("spectrum", help=spectrum_command.__doc__)
    spectrum.set_defaults(run=spectrum_command)
    spectrum.add_argument("--device", default="cpu")
    spectrum.add_argument("--rank", type=int, default=32)
    spectrum.add_argument("--seed", type=int, default=0)
    spectrum.add_argument("--rounds", type=int, default=9)
    spectrum.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    spectrum.add_argument("--largest", type=int, default=8192, help="skip larger smaller sides")
    spectrum.add_argument("--exact-limit", type=int, default=8192, help="largest side for svdvals")
    spectrum.add_argument("--full-limit", type=int, default=4096, help="largest side for svd")
    spectrum.add_argument(
        "--quick",
        action="store_true",
        help="3 rounds, a few settings, smaller sides up to 4096 (dense SVD: 1024)",
    )
    check = commands.add_parser("check", help=check_command.__doc__)
    check.set_defaults(run=check_command)
    check.add_argument("--device", default="cpu")
    check.add_argument("--rounds", type=int, default=5)
    commands.add_parser("wire", help=wire_command.__doc__).set_defaults(run=wire_command)
    return top


def main() -> None:
    """Run one subcommand."""
    args = parser().parse_args()
    if getattr(args, "quick", False):
        args.rounds, args.largest, args.exact_limit, args.full_limit = 3, 4096, 1024, 1024
    if getattr(args, "threads", None):
        torch.set_num_threads(args.threads)
    with threadpool_limits(torch.get_num_threads()):  # of numpy and scipy, which are loaded above
        args.run(args)


if __name__ == "__main__":
    main()
