"""Reads an offline run of W&B back from its folder."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The transaction log of W&B has the format of LevelDB's: a header, and blocks with records, which may go over several.
_HEADER, _BLOCK, _RECORD_HEADER = 7, 32768, 7
_WHOLE, _LAST = 1, 4


@dataclass
class OfflineRun:
    """What an offline run has recorded.

    Attributes:
        folder: Its folder.
        rows: The logged values, one mapping for each call of ``log``.
        axes: The step axis of each key that has one.
        config: The configuration.
        charts: The keys of custom charts, with the name of their kind.
        summary: The last value of each key.
        artifacts: The artifacts in order.
        alerts: The titles of alerts.
    """

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> OfflineRun:
        """Reads the finished run in a folder. W&B writes the last records after ``finish`` has returned."""
        (log,) = folder.glob("run-*.wandb")
        while True:
            run, ended = cls(folder), False
            for record in _records(log):
                ended |= record.WhichOneof("record_type") == "exit"
                run._add(record)
            if ended:
                return run
            time.sleep(0.1)

    def _add(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "history":
            self.rows.append(_nested(record.history.item))
        elif kind == "metric" and record.metric.name and record.metric.step_metric:
            self.axes[record.metric.name] = record.metric.step_metric
        elif kind == "config":
            for item in record.config.update:
                if list(item.nested_key[:2]) == ["_wandb", "visualize"]:
                    self.charts[item.nested_key[2]] = json.loads(item.value_json)["panel_config"]["panelDefId"]
                else:
                    self.config[item.key] = json.loads(item.value_json)
        elif kind == "summary":
            self.summary |= _nested(record.summary.update)
        elif kind == "artifact":
            self.artifacts.append(record.artifact)
        elif kind == "alert":
            self.alerts.append(record.alert.title)

    @property
    def keys(self) -> set[str]:
        """The keys that this package has logged."""
        return {key for row in self.rows for key in row if key.startswith("gif_")}

    def values(self, key: str) -> list[Any]:
        """All logged values of a key."""
        return [row[key] for row in self.rows if key in row]

    def file(self, key: str) -> Path:
        """The file of the last value of a key."""
        return self.folder / "files" / self.values(key)[-1]["path"]

    def table(self, key: str) -> list[dict[str, Any]]:
        """The rows of the last table of a key, by column."""
        table = json.loads(self.file(key).read_text())
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def _records(log: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    content, position, parts = log.read_bytes(), _HEADER, b""
    while position + _RECORD_HEADER <= len(content):
        left = _BLOCK - position % _BLOCK
        if left < _RECORD_HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + _RECORD_HEADER])
        start = position + _RECORD_HEADER
        if start + length > len(content):
            return  # W&B is still writing this record
        parts, position = parts + content[start : start + length], start + length
        if kind in (_WHOLE, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def _nested(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        key, *rest = item.nested_key or [item.key]
        value = json.loads(item.value_json)
        for part in reversed(rest[1:]):
            value = {part: value}
        if rest:
            found.setdefault(key, {})[rest[0]] = value
        else:
            found[key] = value
    return found
