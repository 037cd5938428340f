"""The checks behind tests/gpu.sh, one module each; `report.py` runs them."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
