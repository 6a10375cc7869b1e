"""GXPO inside other people's trainers."""

from __future__ import annotations
