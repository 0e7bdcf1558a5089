"""The arm's equations of motion: textbook cases by hand, energy, power, and a mass matrix that is one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gatewright.data.robot_arm import POSITION, TORQUE, VELOCITY, Arm, arm_cases

ARM = Arm()


def states(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return tuple(draw.uniform(-3, 3, (count, 4)) for _ in range(3))  # type: ignore[return-value]


def test_one_rod_is_the_physical_pendulum():
    # A rod of length l about its end: m l^2 / 3, here with a cylinder's m r^2 / 4; gravity's moment m g l/2
    # cos q.
    arm = Arm("y", (0.5,), (2.0,), radius=0.1)
    inertia = 2.0 * 0.5**2 / 3 + 2.0 * 0.1**2 / 4
    q, tau = np.array([[0.3], [-1.0]]), np.array([[0.7], [-2.0]])
    # The y axis points so that a positive angle lowers the link: gravity helps it.
    expected = (tau + 2.0 * 9.81 * 0.25 * np.cos(q)) / inertia
    np.testing.assert_allclose(arm.accelerations(q, np.ones_like(q), tau), expected, rtol=1e-12)


def test_two_links_in_a_plane_are_the_textbook_s():
    # M11 = a + 2 b cos q2, M12 = d + b cos q2, M22 = d; Coriolis -b sin q2 (2 q1' q2' + q2'^2) and b sin q2
    # q1'^2.
    l1, l2, m1, m2, r = 0.4, 0.3, 3.0, 2.0, 0.05
    arm = Arm("yy", (l1, l2), (m1, m2), r, gravity=0.0)
    own = [m * (3 * r**2 + length**2) / 12 for m, length in ((m1, l1), (m2, l2))]
    d = own[1] + m2 * l2**2 / 4
    a = own[0] + m1 * l1**2 / 4 + d + m2 * l1**2
    b = m2 * l1 * l2 / 2
    q, dq, ddq = np.array([[0.4, 0.9]]), np.array([[1.3, -0.6]]), np.array([[0.2, -1.1]])
    c, s = math.cos(0.9), math.sin(0.9)
    first = (a + 2 * b * c) * 0.2 + (d + b * c) * -1.1 - b * s * (2 * 1.3 * -0.6 + 0.36)
    second = (d + b * c) * 0.2 + d * -1.1 + b * s * 1.3**2
    np.testing.assert_allclose(arm.torques(q, dq, ddq), [[first, second]], rtol=1e-12)


def test_the_stretched_arm_turns_about_the_vertical_as_rods_in_a_row():
    # Each rod: its moment across, m (3 r^2 + l^2) / 12, plus m times the squared distance of its middle.
    expected, reach = 0.0, 0.0
    for length, mass in zip(ARM.lengths, ARM.masses, strict=True):
        across = mass * (3 * ARM.radius**2 + length**2) / 12
        expected += across + mass * (reach + length / 2) ** 2
        reach += length
    assert ARM.mass_matrix(np.zeros((1, 4)))[0, 0, 0] == pytest.approx(expected, rel=1e-12)


def test_the_mass_matrix_is_symmetric_and_positive():
    matrix = ARM.mass_matrix(states(500)[0])
    np.testing.assert_allclose(matrix, matrix.transpose(0, 2, 1), atol=1e-12)
    assert np.linalg.eigvalsh(matrix).min() > 0


def test_forward_dynamics_undo_inverse_dynamics():
    q, dq, ddq = states(200)
    np.testing.assert_allclose(ARM.accelerations(q, dq, ARM.torques(q, dq, ddq)), ddq, atol=1e-9)


def test_energy_changes_by_the_power_of_the_torques():
    q, dq, tau = states(100)
    ddq, step = ARM.accelerations(q, dq, tau), 1e-5
    ahead, behind = (ARM.energy(q + t * dq + t * t / 2 * ddq, dq + t * ddq) for t in (step, -step))
    np.testing.assert_allclose((ahead - behind) / (2 * step), (tau * dq).sum(1), rtol=1e-5, atol=1e-5)


def test_energy_is_kept_where_nothing_drives_the_arm():
    q, dq, _ = states(3, seed=1)
    free, step = np.zeros_like(q), 2e-3
    before = ARM.energy(q, dq)

    def slope(position: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return velocity, ARM.accelerations(position, velocity, free)

    for _ in range(60):  # Runge and Kutta's fourth order
        one = slope(q, dq)
        two = slope(q + step / 2 * one[0], dq + step / 2 * one[1])
        three = slope(q + step / 2 * two[0], dq + step / 2 * two[1])
        four = slope(q + step * three[0], dq + step * three[1])
        q, dq = (
            own + step / 6 * (one[i] + 2 * two[i] + 2 * three[i] + four[i]) for i, own in enumerate((q, dq))
        )
    np.testing.assert_allclose(ARM.energy(q, dq), before, rtol=1e-7)


def test_cases_are_those_of_their_seed_and_within_their_ranges():
    one, again, other = arm_cases(50, 3), arm_cases(50, 3), arm_cases(50, 4)
    assert one.inputs.shape == (50, 12)
    np.testing.assert_array_equal(one.inputs, again.inputs)
    assert not np.allclose(one.inputs, other.inputs)
    q, dq, tau = np.split(one.inputs, 3, axis=1)
    np.testing.assert_allclose(one.accelerations, ARM.accelerations(q, dq, tau))
    for own, most in ((q, POSITION), (dq, VELOCITY), (tau, np.array(TORQUE))):
        assert (np.abs(own) <= most).all()
        assert (np.abs(own).max(0) > 0.7 * np.asarray(most)).all()
