"""The adapters of the two ports that come with the suite: gxpo.py and the numpy oracle."""

from __future__ import annotations
