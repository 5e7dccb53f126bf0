"""The tables of the pages in python/docs, from the results of the benchmarks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from step import OURS, PEERS

from implicit_rnn.experiments.cost import LABELS

DOCS = Path(__file__).parents[2] / "python" / "docs"


def publish(name: str, result: dict[str, Any]) -> None:
    """Put the table of a benchmark between its marks in the page."""
    machine, page = result["machine"], DOCS / ("sklearn.md" if name == "datasets" else "performance.md")
    where = f"{machine['processor']}, {machine['cores']} cores, Julia threads {machine['threads']}, load {machine['load']:.1f}"
    text = page.read_text("utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    table = f"{begin}\n{TABLES[name](result)}\n\n*{where}.*\n\n{end}"
    changed, count = re.subn(pattern, lambda _: table, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page} has {count} places marked {begin.strip()}; expected one")
    page.write_text(changed, "utf-8")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step(result: dict[str, Any]) -> str:
    header = ["neurons x batch", OURS, *PEERS, "best peer / ours", "ours / gemm floor"]
    rows = []
    for row in result["rows"]:
        cells = [row["results"].get(name) for name in (OURS, *PEERS)]
        times = [f"{c['seconds'] * 1e3:.3g} ms ({c['gradient error']:.0e})" if c else "absent" for c in cells]
        ratio = f"**{row['ratio']:.1f}**" if row["ratio"] else "-"
        rows.append([row["name"].replace(" x ", " × "), *times, ratio, f"{row['over floor']:.1f}"])
    return markdown(header, rows)


def fit(result: dict[str, Any]) -> str:
    header = ["nets", f"{OURS}, steps of nets per second", "jax", "deviation of the losses", "jax / ours"]
    rows = []
    for row in result["rows"]:
        rates = [row["steps per second"].get(name) for name in (OURS, "jax")]
        compared = row["ratio"] is not None
        rows.append(
            [row["name"].replace(" x ", " × "), *(f"{rate:,.0f}" if rate else "absent" for rate in rates)]
            + ([f"{row['deviation']:.0e}", f"**{row['ratio']:.1f}**"] if compared else ["-", "-"])
        )
    return markdown(header, rows)


def equations(result: dict[str, Any]) -> str:
    header = ["", OURS, "jax", "jax / ours"]
    rows = []
    for row in result["rows"]:
        cells = [row["results"].get(name) for name in (OURS, "jax")]
        times = [f"{c['seconds'] * 1e3:.3g} ms ({c['error']:.0e})" if c else "absent" for c in cells]
        rows.append([row["name"], *times, f"**{row['ratio']:.1f}**" if row["ratio"] else "-"])
    return markdown(header, rows)


def memory(result: dict[str, Any]) -> str:
    header = ["gradient", "steps or tolerance", "iterations", "time", "peak memory", "error"]
    rows = [
        [
            LABELS[p["method"]],
            f"{p['setting']:.0f}" if p["method"] == "unrolled" else f"{p['setting']:.0e}",
            f"{p['iterations']:.0f}",
            f"{p['seconds'] * 1e3:.3g} ms",
            f"{p['peak_bytes'] / 1e6:.1f} MB",
            f"{p['error']:.0e}",
        ]
        for p in result["points"]
    ]
    return markdown(header, rows)


def scale(result: dict[str, Any]) -> str:
    header = ["neurons", "layers", "batch", "time", "per sample", "peak memory", "inputs"]
    rows = [
        [
            f"{r['neurons']}",
            f"{r['layers']}",
            f"{r['batch']}",
            f"{r['seconds'] * 1e3:.3g} ms",
            f"{r['seconds'] / r['batch'] * 1e6:.3g} µs",
            f"{r['peak bytes'] / 1e6:.1f} MB",
            f"{r['input bytes'] / 1e6:.1f} MB",
        ]
        for series in result["series"].values()
        for r in series
    ]
    return markdown(header, rows)


def startup(result: dict[str, Any]) -> str:
    rows = [["import alone", f"{median(result['imports']):.3f} s"]]
    rows += [[name, f"{median([s[name] for s in result['starts']]):.2f} s"] for name in result["starts"][0]]
    compiled = result["compiled"]
    rows.append(["specialisations of ImplicitRNN compiled at run time", f"{len(compiled['ours'])}"])
    rows.append(["specialisations of other packages", f"{compiled['others']}"])
    return markdown(["until", "seconds since the start of Python code"], rows)


def bridge(result: dict[str, Any]) -> str:
    quartiles = result["quartiles in microseconds"]
    return markdown(
        ["engine", "median", "quartiles"],
        [[name, f"{q[1]:.1f} µs", f"{q[0]:.1f} to {q[2]:.1f} µs"] for name, q in quartiles.items()],
    )


def datasets(result: dict[str, Any]) -> str:
    header = ["data", "samples", "score", "ours", "MLP", "difference", "p", "verdict"]
    rows = [
        [
            r["data"],
            f"{r['samples']}",
            r["score"],
            f"{r['ours']:.3f}",
            f"{r['MLP']:.3f}",
            f"{r['difference']:+.3f}",
            f"{r['p']:.3f}",
            r["verdict"],
        ]
        for r in result["rows"]
    ]
    return markdown(header, rows)


TABLES = {
    "step": step,
    "fit": fit,
    "equations": equations,
    "memory": memory,
    "scale": scale,
    "startup": startup,
    "bridge": bridge,
    "datasets": datasets,
}
