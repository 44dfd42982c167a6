"""Reads an exposition in the text format of Prometheus from standard input with the reference parser and
writes its samples as JSON. What the parser refuses, and families without help or type, are errors."""

import json
import sys

from prometheus_client.parser import text_string_to_metric_families

text = sys.stdin.read()
samples = []
seen = set()
for family in text_string_to_metric_families(text):
    if family.type not in ("counter", "gauge", "histogram") or not family.documentation:
        sys.exit(f"{family.name}: type {family.type}, help {family.documentation!r}")
    if family.name in seen:
        sys.exit(f"{family.name} stands there twice")
    seen.add(family.name)
    for sample in family.samples:
        samples.append({"name": sample.name, "labels": sample.labels, "value": sample.value, "type": family.type})
if not text.endswith("\n"):
    sys.exit("the last line does not end")
json.dump(samples, sys.stdout)
