"""The toy problems: quadratics and bandits in numpy, tasks for the batched engine in torch."""

from __future__ import annotations
