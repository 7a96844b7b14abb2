"""Tables from the JSON lines of plugin.py: python table.py RUN.jsonl [BASELINE.jsonl] [--list KIND].

With --list, the tests of that kind and why. BASELINE.jsonl is of the same tests with PEFT itself: what fails there says
nothing of lowbit.
"""

import argparse
import collections
import json

KINDS = ("passed", "shim", "missing", "refused", "explained", "fault?", "vacuous", "peer fails", "skipped")
#: Kinds that say something of lowbit.
COUNTED = ("passed", "shim", "missing", "refused", "explained", "fault?")


def read(path):
    found = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            # a failing teardown does not undo what the call said, unless the call passed
            if row["id"] not in found or found[row["id"]]["kind"] in ("passed", "shim"):
                found[row["id"]] = row
    return found


def compared(rows, base):
    """The rows, those that PEFT does not pass either under kinds of their own."""
    for name, row in rows.items():
        if name in base and base[name]["kind"] != "passed":
            row["kind"] = "peer fails" if base[name]["kind"] == "failed" else "skipped"
        if row["kind"] in ("xfailed", "xpassed"):
            row["kind"] = "skipped"
    return rows


def table(rows, field):
    groups = collections.defaultdict(collections.Counter)
    for row in rows.values():
        groups[row[field]][row["kind"]] += 1
    groups = dict(sorted(groups.items()))
    groups["total"] = sum(groups.values(), collections.Counter())
    width = max(map(len, groups))
    print(f"{field:{width}} " + " ".join(f"{kind:>10}" for kind in ("tests", *KINDS)))
    for name, counter in groups.items():
        cells = [sum(counter.values()), *(counter[kind] for kind in KINDS)]
        print(f"{name:{width}} " + " ".join(f"{value:10}" for value in cells))
    print()


def reasons(rows, kind, title):
    found = collections.Counter(row["detail"] for row in rows.values() if row["kind"] == kind)
    if found:
        print(title)
        for what, count in found.most_common():
            print(f"{count:6}  {what}")
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("baseline", nargs="?")
    parser.add_argument("--list")
    args = parser.parse_args()
    rows = compared(read(args.run), read(args.baseline) if args.baseline else {})
    if args.list:
        for row in rows.values():
            if row["kind"] == args.list:
                print(row["id"], "|", row["detail"][:160].replace("\n", " "))
        return
    table(rows, "layer")
    table(rows, "feature")
    reasons(rows, "missing", "what lowbit lacks (the first thing that each test misses):")
    reasons(rows, "refused", "what lowbit refuses on a quantized weight:")
    reasons(rows, "explained", "what lowbit does in another way:")
    reasons(rows, "shim", "passes of what the shim or PEFT itself provides, which do not count:")
    counter = collections.Counter(row["kind"] for row in rows.values())
    print(f"{counter['passed']} of {sum(counter[kind] for kind in COUNTED)} of PEFT's tests pass")


if __name__ == "__main__":
    main()
