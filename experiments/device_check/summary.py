"""Records in words: a line for each as it comes, and what matters in a table at the end."""

from collections.abc import Sequence

from experiments.device_check.records import LAST, Record


def line(record: Record) -> str | None:
    """One record for the terminal; None for those that say nothing new."""
    head = f"{record['at_s']:>6.0f} s"
    match record["event"]:
        case "started":
            return f"{head}  {record['device']}, jax {record['jax']}"
        case "stage":
            return f"{head}  == {record['stage']}: {record['end']} ({record['seconds']:.0f} s)"
        case "result":
            return f"{head}  {record['check']}: {figures(record)} ({spent(record)})"
        case "error":
            return f"{head}  {record['check']}: FAILED {record['error']} ({spent(record)})"
        case "skipped" | "ended":
            return f"{head}  {record['check']}: {record['event']}, {record['reason']}"
    return None


def spent(record: Record) -> str:
    """Seconds that a measurement took, those in the compiler apart."""
    return f"{record['seconds']:.1f} s, {record['compile_s'] + record['lower_s']:.1f} of them compiling"


def figures(record: Record) -> str:
    """What a result says, by the stage that it is of."""
    if "copy_bytes_per_s" in record:
        return f"{record['copy_bytes_per_s'] / 1e9:,.0f} GB/s read and written"
    if "difference" in record:
        return f"differs by {record['difference']:.1e} of at most {record['tolerance']:.0e}"
    if "copy_share" in record:
        return f"{1e6 * record['times']['median_s']:,.0f} us, {record['copy_share']:.1%} of a copy"
    if "flops_per_s" in record:
        return f"{1e6 * record['times']['median_s']:,.0f} us, {record['flops_per_s'] / 1e12:.3g} TFLOP/s"
    if "steps" in record:
        return steps(record)
    if "strict_attainment" in record:
        ttft, tbt = record["ttft_s"], record["tbt_s"]
        return (
            f"strict {record['strict_attainment']:.1%}, first token P50 {ttft['p50']:.3g} s, P99 {ttft['p99']:.3g} s, "
            f"gaps P50 {1e3 * tbt['p50']:.3g} ms, P99 {1e3 * tbt['p99']:.3g} ms, "
            f"longest {record['longest_gap_s']:.2g} s"
        )
    return "ready"


def steps(record: Record) -> str:
    """Decode steps of both kinds, and rho."""
    parts = [
        f"{step['kind']} {1e3 * step['times']['median_s']:.2f} ms, floor {step['floor_share']:.1%}"
        if step["times"] else f"{step['kind']} not measured: {step['error']}"
        for step in record["steps"]
    ]  # fmt: skip
    rho = record["rho_s"]
    return ", ".join([*parts, *([] if rho is None else [f"rho {1e9 * rho:+.2f} ns"])])


def table(records: Sequence[Record]) -> str:
    """All that was measured, stage by stage, in Markdown."""
    started = [r for r in records if r["event"] == "started"]
    lines = ["# Device check", ""]
    lines += [f"{r['device']}, jax {r['jax']}, jaxlib {r['jaxlib']}, {r['driver']}" for r in started]
    for stage in dict.fromkeys(r["stage"] for r in records if "stage" in r):
        end = next(
            (f": {r['end']}, {r['seconds']} s" for r in records if r["event"] == "stage" and r["stage"] == stage), ""
        )
        lines += ["", f"## {stage}{end}", "", "| | | s | compiling s |", "|---|---|---|---|"]
        for r in records:
            if r.get("stage") == stage and r["event"] in LAST:
                said = figures(r) if r["event"] == "result" else f"{r['event']}: {r.get('error') or r.get('reason')}"
                said = said.replace("|", "/")
                times = (f"{r['seconds']:.1f}", f"{r['compile_s'] + r['lower_s']:.1f}") if "seconds" in r else ("", "")
                lines.append(f"| {r['check']} | {said} | {times[0]} | {times[1]} |")
    return "\n".join(lines) + "\n"


def failures(records: Sequence[Record]) -> list[str]:
    """Measurements that failed or had to be ended."""
    return [r["check"] for r in records if r["event"] in ("error", "ended")]
