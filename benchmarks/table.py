"""Makes the README's tables of speed and memory from the files that train.py wrote: python benchmarks/table.py [--check]

They stand between two comments in README.md. A cell that no file has says "not measured"; of several, the newest counts.
--check changes nothing and fails where the README is not what the files say.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

import cells  # noqa: E402
from cells import LENGTHS, NAMES, OK, PUBLISHED  # noqa: E402

BEGIN, END = "<!-- made by benchmarks/table.py -->", "<!-- end of what benchmarks/table.py made -->"
NOT = "not measured"
WAY_NAMES = {"ours": "this toolkit", "transformers": "transformers + peft", "liger": "the same + liger", "trl": "TRL"}


def newest(stored: list[dict]) -> dict[tuple, dict]:
    """{(way, method, size, length): cell}: measured on a GPU, recomputing left to the program; the newest, if it came to an end."""
    found = {}
    for cell in stored:
        place = tuple(cell[name] for name in ("way", "method", "size", "length"))
        if cell["recompute"] != "auto" or cell["machine"].startswith("CPU"):
            continue
        if place not in found or cells.is_final(cell):
            found[place] = cell
    return found


def tables(found: dict[tuple, dict]) -> str:
    """Both tables, and where they come from."""
    parts = [table(found, size) for size in ("7B", "1.8B")]
    return "\n\n".join([origin(found), *parts])


def origin(found: dict) -> str:
    """A line on machine and ceiling."""
    if not found:
        return "No file of a GPU is there yet: every cell below is still to be measured."
    seen: dict[tuple, list[float]] = {}
    for cell in found.values():
        versions = ", ".join(f"{name} {cell['versions'][name]}" for name in ("torch", "transformers") if name in cell["versions"])
        seen.setdefault((cell["machine"], cell["date"], versions), []).append(cell["ceiling"])
    lines = []
    for (machine, date, versions), ceilings in sorted(seen.items()):
        low, high = f"{min(ceilings):.0f}", f"{max(ceilings):.0f}"
        rate = low if low == high else f"{low} to {high}"
        lines.append(f"{machine}, {date}{versions and f', {versions}'}, {rate} TFLOP/s at a large bf16 product")
    return f"Measured on {'; '.join(lines)}. Use: model FLOP over that."


def table(found: dict, size: str) -> str:
    """Of one size: a row for each method and trainer that has a figure; of this toolkit always, of published ones what there is."""
    head = f"| {size}, s/step and GB | " + " | ".join(f"{length:,}" for length in LENGTHS) + " |"
    rows = [head, "|---" * (len(LENGTHS) + 1) + "|"]
    for method in NAMES:
        for way in WAY_NAMES:
            measured = [found.get((way, method, size, length)) for length in LENGTHS]
            if way == "ours" or any(measured):
                name = f"**{NAMES[method]}**" if way == "ours" else f"{NAMES[method]}, {WAY_NAMES[way]}"
                rows.append(f"| {name} | " + " | ".join(map(shown, measured)) + " |")
        if (size, method) in PUBLISHED:
            memory, seconds = PUBLISHED[size, method]
            memory = memory or [None] * len(LENGTHS)
            pairs = (f"{s:.1f} s{'' if gb is None else f', {gb:.1f}'}" for gb, s in zip(memory, seconds))
            rows.append(f"| {NAMES[method]}, published (A100) | " + " | ".join(pairs) + " |")
    return "\n".join(rows)


def shown(cell: dict | None) -> str:
    """A place of the table."""
    if cell is None:
        return NOT
    if cell["status"] != OK:
        return cell["status"]
    return f"{cell['seconds_per_step']:.2f} s, {cell['memory_gb']:.1f} ({cell['utilization']:.0%})"


def put(readme: str, text: str) -> str:
    """The README with the text in its place."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest and after, f"README.md lacks {BEGIN} or {END}"
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    options, path = parser.parse_args(), ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    made = put(readme, tables(newest(cells.stored())))
    if made == readme:
        print("README.md says what the files say")
    elif options.check:
        sys.exit("README.md does not say what the files in benchmarks/results say - run python benchmarks/table.py")
    else:
        path.write_text(made, encoding="utf-8")
        print("README.md: the tables are new")


if __name__ == "__main__":
    main()
