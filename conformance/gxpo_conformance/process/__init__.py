"""A port in a process of its own: pipes, the protocol on them, and the other side of it."""

from __future__ import annotations
