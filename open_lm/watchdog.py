"""Stub."""

from __future__ import annotations


def beat(phase: str, step: int | None = None) -> None:
    pass
