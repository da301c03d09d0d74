"""`python -m tools.doctor`: is this machine and this install fit to train? Says what is wrong and what mends it.

Plain text on purpose: the doctor must work where nothing but the standard library does.
"""

import argparse
import dataclasses
import json
import textwrap

from tools.doctor.checks import Check, check_all
from tools.doctor.facts import gather

WIDTH = 80


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.doctor", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    return parser


def report(checks: list[Check]) -> dict:
    """{"status": the worst of all, "checks": [{"name", "status", "found", "remedy"}], "next": what to do now}"""
    faults, warnings = ([c.name for c in checks if c.status == status] for status in ("fault", "warn"))
    if faults:
        next_step = f"Broken: {', '.join(faults)}. Run the commands marked -> from the top, then: make doctor"
    elif warnings:
        next_step = f"Fit to train; mind {', '.join(warnings)} before a larger job. Next: make quickstart"
    else:
        next_step = "All well. Next: make quickstart"
    status = "fault" if faults else "warn" if warnings else "ok"
    return {"status": status, "checks": [dataclasses.asdict(c) for c in checks], "next": next_step}


def render(result: dict) -> str:
    name_width = max(len(check["name"]) for check in result["checks"])
    indent = " " * (len("fault  ") + name_width + 2)
    lines: list[str] = []
    for check in result["checks"]:
        head = f"{check['status']:<5}  {check['name']:<{name_width}}  "
        lines += textwrap.wrap(check["found"], WIDTH, initial_indent=head, subsequent_indent=indent)
        remedy = f"       -> {check['remedy']}"  # never wrapped: one line to copy
        if check["remedy"] and remedy not in lines:
            lines.append(remedy)
    return "\n".join([*lines, "", *textwrap.wrap(result["next"], WIDTH)])


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 fit (warnings are no fault), 1 a fault, 2 usage."""
    args = build_parser().parse_args(argv)
    result = report(check_all(gather()))
    print(json.dumps(result, indent=2) if args.json else render(result))
    return int(result["status"] == "fault")
