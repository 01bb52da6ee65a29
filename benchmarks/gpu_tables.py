"""The GPU's tables, from the CSV file that gpu.py writes."""

from __future__ import annotations

from gpu_report import like
from report import DENSE, OURS, Result, caption

TORCH = "torch"
RIVALS = {DENSE: "dense", TORCH: "torch ops", "plain": "plain", "TF32": "TF32", "bf16": "bf16"}
# The speed-ups to reach, by row: over whom, and how large.
TARGETS: dict[str, tuple[str, float]] = {
    "k-winners fused, 1024 x 1000 float32": (TORCH, 5),
    "selection 65536 x 1024 float32, k=102": (TORCH, 6),
    "selection 2048 x 131072 float32, k=64": (TORCH, 4),
    **{f"linear 1600->1000 d=0.4 G=1 + k-winners, B={B}": (TORCH, 2.5) for B in (1, 8, 64)},
    "linear 4096->16384 d=0.1 G=64 bfloat16, B=1024": (DENSE, 3),
    "linear 4096->16384 d=0.1 G=64 float32, B=1024": (DENSE, 6),
    "FFN down 14336->4096, 5% active, bfloat16, B=1": (DENSE, 4),
    "decode 131072->4096 k=64 bfloat16, B=4096, forward": (DENSE, 8),
    "decode 131072->4096 k=64 bfloat16, B=4096, backward": (DENSE, 6),
    "conv 64->64 5x5 on 14x14, 10% active, float32, B=1024": (DENSE, 2),
}
NEVER_SLOWER = 0.95  # of dense, for every other row


def gpu_table(results: list[Result], where: dict[str, str]) -> str:
    """A row for each way of calling: our time, and how much faster it is than the best of each rival's."""
    header = ["layer or network", "work", "called", "us", *(f"over {name}" for name in RIVALS.values()), "target"]
    lines = [header, ["---", "---", "---", *["---:"] * (len(header) - 3)]]
    for result in results:
        for graphed in (True, False):
            ours = like(result, OURS, graphed)
            if ours is not None:
                called = "in a graph" if graphed else "eagerly"
                overs = [_over(result, role, graphed) for role in RIVALS]
                lines.append(
                    [_name(result), result.work, called, f"{1e3 * ours:.1f}", *overs, _target(result, graphed)]
                )
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = (
        "Ours and dense are float32 without TF32 (bfloat16 where the row says so), and compared with dense in TF32 and "
        "bfloat16 too; plain is the same network in plain PyTorch."
    )
    return f"{table}\n\n{caption(where)}. Checked first, then timed side by side. {notes}"


def _name(result: Result) -> str:
    return f"{result.case}, B={result.batch}" if result.work else result.case


def _ratio(result: Result, role: str, graphed: bool) -> float | None:
    ours, theirs = (like(result, r, graphed) for r in (OURS, role))
    return None if ours is None or theirs is None else theirs / ours


def _over(result: Result, role: str, graphed: bool) -> str:
    ratio = _ratio(result, role, graphed)
    return "" if ratio is None else f"{ratio:.2f}x"


def _target(result: Result, graphed: bool) -> str:
    role, target = TARGETS.get(result.case, (DENSE, NEVER_SLOWER))
    ratio = _ratio(result, role, graphed)
    return "" if ratio is None else f"{target:g}x {'reached' if ratio >= target else 'missed'}"
