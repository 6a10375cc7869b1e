"""Tasks that take minutes on a CPU, on which GXPO, GRPO and others are compared: the command gxpo-toys."""

from __future__ import annotations
