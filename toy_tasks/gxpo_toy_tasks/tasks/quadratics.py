"""Quadratic losses whose every gradient-descent point has a closed form.

    loss(x) = 0.5 (x - x*)^T H (x - x*)        gradient(x) = H (x - x*)

The largest eigenvalue of H is 1, the others are log-spaced down to 1 / condition: plain gradient descent is stable
for lr < 2. On a diagonal one each coordinate's gradient shrinks by the same factor 1 - lr h every step, which is the
model that GXPO extrapolates with; on a rotated one it does not.

    problem = Quadratic.rotated(dim=8, condition=100.0, seed=0)
    loss, grads = problem.gradient(problem.initial())
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Params = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Quadratic:
    """0.5 (x - minimum)^T matrix (x - minimum), from `start`. All float64, no units; params are {"x": (dim,)}.

    name: for reports. matrix: (dim, dim), symmetric. minimum, start: (dim,).
    The arrays are read-only copies. ValueError if their shapes do not fit or the matrix is not symmetric.
    """

    name: str
    matrix: np.ndarray
    minimum: np.ndarray
    start: np.ndarray

    def __post_init__(self) -> None:
        for field in ("matrix", "minimum", "start"):
            array = np.array(getattr(self, field), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, field, array)
        dim = self.minimum.size
        for field, wanted in (("minimum", (dim,)), ("start", (dim,)), ("matrix", (dim, dim))):
            if getattr(self, field).shape != wanted:
                raise ValueError(f"{field} must have shape {wanted}, got {getattr(self, field).shape}")
        if not np.array_equal(self.matrix, self.matrix.T):  # H (x - x*) would not be the gradient
            raise ValueError(f"matrix must be symmetric, got {self.matrix.tolist()}")

    @classmethod
    def diagonal(cls, dim: int = 8, condition: float = 10.0, seed: int = 0) -> Quadratic:
        """Eigenvalues 1 .. 1 / condition along the axes."""
        return _build("diagonal", dim, condition, seed, rotate=False)

    @classmethod
    def rotated(cls, dim: int = 8, condition: float = 10.0, seed: int = 0) -> Quadratic:
        """The same eigenvalues in a random orthogonal basis: no coordinate shrinks by one factor any more."""
        return _build("rotated", dim, condition, seed, rotate=True)

    @classmethod
    def ill_conditioned(cls, dim: int = 8, seed: int = 0, rotated: bool = False) -> Quadratic:
        """Condition 1e4: on the diagonal one the flattest coordinates fall under GXPO's activity threshold."""
        return _build("ill-conditioned rotated" if rotated else "ill-conditioned", dim, 1e4, seed, rotate=rotated)

    def initial(self) -> Params:
        """The parameters to start from, a fresh copy."""
        return {"x": self.start.copy()}

    def loss(self, params: Mapping[str, np.ndarray]) -> float:
        """The loss at `params`. ValueError if they are not {"x": (dim,)}."""
        return self.gradient(params)[0]

    def gradient(self, params: Mapping[str, np.ndarray]) -> tuple[float, Params]:
        """(loss, {"x": H (x - x*)}), float64. ValueError if `params` is not {"x": (dim,)}."""
        shapes = {name: np.shape(value) for name, value in params.items()}
        if shapes != {"x": self.start.shape}:
            raise ValueError(f"params must be {{'x': {self.start.shape}}}, got {shapes}")
        # A port that diverges gets inf and nan back, as from any framework, not a numpy warning.
        with np.errstate(over="ignore", invalid="ignore"):
            away = np.asarray(params["x"], dtype=np.float64) - self.minimum
            slope = self.matrix @ away
            return float(0.5 * (away @ slope)), {"x": slope}


def plain_steps(quadratic: Quadratic, x: np.ndarray, lr: float, k: int) -> np.ndarray:
    """Where k steps of plain gradient descent from x end: x* + (I - lr H)^k (x - x*). x and result: (dim,)."""
    if k < 0:
        raise ValueError(f"k must be at least 0, got {k}")
    if np.shape(x) != quadratic.start.shape:
        raise ValueError(f"x must have shape {quadratic.start.shape}, got {np.shape(x)}")
    contraction = np.linalg.matrix_power(np.eye(len(x)) - lr * quadratic.matrix, k)
    return quadratic.minimum + contraction @ (np.asarray(x, dtype=np.float64) - quadratic.minimum)


def _build(name: str, dim: int, condition: float, seed: int, rotate: bool) -> Quadratic:
    if dim < 2:
        raise ValueError(f"dim must be at least 2 (a condition number needs two eigenvalues), got {dim}")
    if not 1 <= condition < np.inf:
        raise ValueError(f"condition must be finite and at least 1, got {condition}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    rng = np.random.default_rng(seed)
    # Sizes in [0.5, 1.5]: no coordinate starts by chance so near its minimum that its gradient shows nothing.
    minimum, offset = rng.uniform(0.5, 1.5, (2, dim)) * rng.choice([-1.0, 1.0], (2, dim))
    matrix = np.diag(np.geomspace(1.0, 1.0 / condition, dim))
    if rotate:
        basis, upper = np.linalg.qr(rng.standard_normal((dim, dim)))
        basis = basis * np.sign(np.diag(upper))  # QR leaves the signs open: fixed, the basis is uniform (Haar)
        matrix = basis @ matrix @ basis.T
        matrix = (matrix + matrix.T) / 2  # the two products differ by rounding
    return Quadratic(f"{name}(dim={dim}, condition={condition:g}, seed={seed})", matrix, minimum, minimum + offset)
