"""A simulated robot arm with four joints in three dimensions: from states and torques to accelerations.

The task of Jordan and Jacobs (1994, section 2.8): 12 inputs (positions, velocities, torques of four joints),
4 outputs (accelerations). Their simulator's constants are not in the paper; those of `Arm` are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ArmCases(NamedTuple):
    """T cases: `inputs` [T, 3 J] = positions (rad), velocities (rad/s), torques (N m); `accelerations`
    [T, J] (rad/s^2).
    """

    inputs: Array
    accelerations: Array


@dataclass(frozen=True)
class Arm:
    """J rigid links in a chain, each a solid cylinder along its own x axis; joint k at the near end of link
    k.

    Joint "z" turns about its link's z axis (the vertical, for the first), "y" about its y axis. No friction.
    Equations of motion: M(q) q'' + b(q, q') = tau, with b of Coriolis, centrifugal and gravity forces.
    """

    axes: str = "zyyy"
    lengths: tuple[float, ...] = (0.3, 0.4, 0.3, 0.2)
    masses: tuple[float, ...] = (4.0, 3.0, 2.0, 1.0)
    radius: float = 0.05
    gravity: float = 9.81

    @property
    def joints(self) -> int:
        """J."""
        return len(self.axes)

    def torques(self, q: Array, dq: Array, ddq: Array, gravity: float | None = None) -> Array:
        """Return the torques [T, J] that make these accelerations: inverse dynamics.

        Equation: Newton and Euler link by link, velocities and accelerations outwards in each link's own
        frame, forces and moments back inwards; gravity is the base accelerating upwards.
        """
        pull = self.gravity if gravity is None else gravity
        turns = [_turn(axis, q[:, k]) for k, axis in enumerate(self.axes)]
        omega, alpha = np.zeros((2, len(q), 3))
        origin = np.tile([0.0, 0.0, pull], (len(q), 1))
        inner: list[tuple[Array, Array]] = []
        for k, axis in enumerate(self.axes):
            unit = _UNITS[axis]
            carried, swung, origin = (_into(turns[k], v) for v in (omega, alpha, origin))
            spin = dq[:, k : k + 1] * unit
            omega = carried + spin
            alpha = swung + np.cross(carried, spin) + ddq[:, k : k + 1] * unit
            middle, end = self._middle(k), 2 * self._middle(k)
            force = self.masses[k] * (origin + _swing(omega, alpha, middle))
            inertia = self._inertia(k)
            moment = inertia * alpha + np.cross(omega, inertia * omega)
            inner.append((force, moment + np.cross(middle, force)))
            origin = origin + _swing(omega, alpha, end)
        force, moment = np.zeros((2, len(q), 3))
        found = np.empty_like(q)
        for k in reversed(range(self.joints)):
            if k + 1 < self.joints:
                force, moment = (_out_of(turns[k + 1], v) for v in (force, moment))
            moment = inner[k][1] + moment + np.cross(2 * self._middle(k), force)
            force = inner[k][0] + force
            found[:, k] = moment @ _UNITS[self.axes[k]]
        return found

    def mass_matrix(self, q: Array) -> Array:
        """Return M(q) [T, J, J]: column j is the torque of a unit acceleration of joint j at rest."""
        still = np.zeros_like(q)
        columns = [self.torques(q, still, still + np.eye(self.joints)[j], 0.0) for j in range(self.joints)]
        return np.stack(columns, axis=-1)

    def accelerations(self, q: Array, dq: Array, tau: Array) -> Array:
        """Return q'' [T, J]: forward dynamics, M(q)^-1 (tau - b(q, q'))."""
        rest = tau - self.torques(q, dq, np.zeros_like(q))
        found: Array = np.linalg.solve(self.mass_matrix(q), rest[..., None])[..., 0].astype(np.float64)
        return found

    def energy(self, q: Array, dq: Array) -> Array:
        """Return kinetic plus potential energy [T], the latter from the heights of the links' middles."""
        kinetic = 0.5 * np.einsum("ti,tij,tj->t", dq, self.mass_matrix(q), dq)
        frame = np.tile(np.eye(3), (len(q), 1, 1))
        height, potential = np.zeros((2, len(q)))
        for k, axis in enumerate(self.axes):
            frame = frame @ _turn(axis, q[:, k])
            rise = frame[:, 2, :] @ self._middle(k)
            potential += self.masses[k] * self.gravity * (height + rise)
            height = height + 2 * rise
        return kinetic + potential

    def _middle(self, k: int) -> Array:
        return np.array([self.lengths[k] / 2, 0.0, 0.0])

    def _inertia(self, k: int) -> Array:
        """Return a solid cylinder's moments about its middle: along its axis, and across it."""
        across = self.masses[k] * (3 * self.radius**2 + self.lengths[k] ** 2) / 12
        return np.array([self.masses[k] * self.radius**2 / 2, across, across])


# What states and torques are drawn from, evenly: rad, rad/s, and N m by joint; such that the best linear map
# leaves about as much of the variance as in the paper, 0.31.
POSITION, VELOCITY, TORQUE = 2.0, 7.0, (30.0, 30.0, 12.0, 3.0)


def arm_cases(num_cases: int, seed: int, arm: Arm | None = None) -> ArmCases:
    """Return cases drawn evenly from -POSITION to POSITION, and so on; the same for the same seed."""
    arm, draw = arm or Arm(), np.random.default_rng(seed)
    shape = (num_cases, arm.joints)
    q, dq = draw.uniform(-POSITION, POSITION, shape), draw.uniform(-VELOCITY, VELOCITY, shape)
    tau = draw.uniform(-1.0, 1.0, shape) * np.array(TORQUE[: arm.joints])
    return ArmCases(np.concatenate([q, dq, tau], axis=1), arm.accelerations(q, dq, tau))


_UNITS = {"y": np.array([0.0, 1.0, 0.0]), "z": np.array([0.0, 0.0, 1.0])}


def _turn(axis: str, angle: Array) -> Array:
    """Return rotations [T, 3, 3] from a link's frame into that of the link before it."""
    c, s, zero, one = np.cos(angle), np.sin(angle), np.zeros_like(angle), np.ones_like(angle)
    rows = (
        [c, -s, zero, s, c, zero, zero, zero, one]
        if axis == "z"
        else [c, zero, s, zero, one, zero, -s, zero, c]
    )
    return np.stack(rows, axis=-1).reshape(-1, 3, 3)


def _into(turn: Array, v: Array) -> Array:
    return np.einsum("tji,tj->ti", turn, v)


def _out_of(turn: Array, v: Array) -> Array:
    return np.einsum("tij,tj->ti", turn, v)


def _swing(omega: Array, alpha: Array, arm: Array) -> Array:
    """Return the acceleration of a point at `arm` of a turning body, beside that of its origin."""
    return np.cross(alpha, arm) + np.cross(omega, np.cross(omega, arm))
