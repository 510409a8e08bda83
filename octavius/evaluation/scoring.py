"""Scores of answered records, one entry per benchmark."""

from collections.abc import Mapping, Sequence
from typing import Any

from octavius.evaluation.benchmarks import BENCHMARKS
from octavius.evaluation.captions import meteor_scores
from octavius.evaluation.metrics import METRICS, Metric
from octavius.evaluation.upstream import upstream_scores


def score(
    records: Sequence[Mapping[str, Any]], meteor: bool = False, upstream: bool = False
) -> dict[str, dict[str, Any]]:
    """Scores of the answered records, one entry per benchmark that occurs, in the registry's order.

    Args:
        records: each has `benchmark`, `prediction` (the answer's text) and the ground truth that its metric needs:
            detection `object` ([{"label", "bbox"}]) and `labels`; caption `sentences`; classification `label` and
            `labels`; choice `gt_choice` (index or letter) and `gt_choices`; attribute `attr` and `labels`;
            scene-answer `label`, `labels` and `sentences`, and `accepted`, the labels of which an answer must name at
            least one, where people answered. A record of a benchmark that is not registered says its `metric`.
        meteor: add METEOR to captions; needs Java.
        upstream: add what the released code would print, faults included, see `octavius.evaluation.upstream`.
    Returns:
        {benchmark: {"title": its row in the tables, "n": samples, "unparsable": answers out of which nothing could be
        read, "main": name of the main value, "intervals": {value's name: [low, high]}, value's name: value, ...}}.
        Intervals are of 95 %, by bootstrap over samples. The main value is the first named.
    Raises:
        ValueError: a key is missing or a ground truth is unusable; the message names the record's id and the key.
    """
    check(records)
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for index, record in enumerate(records):
        if not isinstance(record.get("prediction"), str):
            raise ValueError(f"record {record.get('id', index)!r}: key 'prediction' is missing")
        groups.setdefault(record["benchmark"], []).append(record)
    scores = {}
    order = [name for name in BENCHMARKS if name in groups]
    for name in dict.fromkeys((*order, *groups)):
        rows, metric = groups[name], metric_of(groups[name][0])
        values, intervals = metric.score(rows)
        if meteor and "sentences" in metric.keys:
            more = meteor_scores([row["prediction"] for row in rows], [row["sentences"] for row in rows])
            values, intervals = values | more[0], intervals | more[1]
        if upstream:
            values = values | upstream_scores(metric, rows)
        scores[name] = {
            "title": BENCHMARKS[name].title if name in BENCHMARKS else name,
            "n": len(rows),
            "unparsable": sum(not metric.readable(row) for row in rows),
            "main": metric.main,
            "intervals": intervals,
            **values,
        }
    return scores


def check(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless every record, answered or not, has a benchmark and its ground truth.

    Raises:
        ValueError: a key is missing or a ground truth is unusable; the message names the record's id and the key.
    """
    metrics: dict[str, Any] = {}
    for index, record in enumerate(records):
        name = f"record {record.get('id', index)!r}"
        try:
            metric = metric_of(record)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        benchmark = record["benchmark"]
        if metrics.setdefault(benchmark, metric) is not metric:
            raise ValueError(f"{name}: all records of benchmark {benchmark} must have the same metric")
        for key in metric.keys:
            if record.get(key) is None:
                raise ValueError(f"{name}: key {key!r} is missing; {benchmark} needs {', '.join(metric.keys)}")
        try:
            metric.truth(record)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{name}: {metric.keys[0]!r} is unusable: {error}") from error


def metric_of(record: Mapping[str, Any]) -> Metric:
    """The metric that a record names, or that of its benchmark.

    Raises:
        ValueError: its benchmark is not registered and it names no metric.
    """
    benchmark, metric = record.get("benchmark"), record.get("metric")
    if not isinstance(benchmark, str):
        raise ValueError(f"key 'benchmark' must be a name, got {benchmark!r}")
    if metric is None:
        return BENCHMARKS[benchmark].metric
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    return METRICS[metric]
