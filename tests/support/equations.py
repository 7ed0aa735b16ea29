"""docs/math.md in NumPy: a transcription, which shares no line with `ostinato.reference`.

tests/test_math.py holds it against autograd; the engine is held against it where there is no torch.
"""

import numpy as np


def sigma(x):
    return 1 / (1 + np.exp(-x))


def step(cell, w, x, h, c):
    """Equations 1, 2, 7-10 and 16-22; return h', c' and what backward needs."""
    gates_x, gates_h = x @ w["ih"].T + w["b_ih"], h @ w["hh"].T + w["b_hh"]  # (1)
    if cell.startswith("rnn"):
        a = gates_x + gates_h
        new = np.tanh(a) if cell == "rnn_tanh" else np.where(a <= 0, 0, a)  # (2)
        return new, None, {"x": x, "h": h, "new": new}
    if cell == "gru":
        (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(gates_x, 3, -1), np.split(gates_h, 3, -1)
        r = sigma(r_x + r_h)  # (7)
        z = sigma(z_x + z_h)  # (8)
        n = np.tanh(n_x + r * n_h)  # (9)
        new = (1 - z) * n + z * h  # (10)
        return new, None, {"x": x, "h": h, "r": r, "z": z, "n": n, "n_h": n_h}
    assert cell == "lstm", f"{cell} has no equations here"
    a_i, a_f, a_g, a_o = np.split(gates_x + gates_h, 4, -1)
    i, f, g, o = sigma(a_i), sigma(a_f), np.tanh(a_g), sigma(a_o)  # (16)-(19)
    new_c = f * c + i * g  # (20)
    m = o * np.tanh(new_c)  # (21)
    new = m if w["hr"] is None else m @ w["hr"].T  # (22)
    kept = {"x": x, "h": h, "c": c, "i": i, "f": f, "g": g, "o": o, "new_c": new_c, "m": m}
    return new, new_c, kept


def gates_backward(cell, w, dh, dc, s):
    """Equations 3, 11-15 and 23-30; return dgates_x, dgates_h, direct, dc."""
    if cell == "rnn_tanh":
        da = dh * (1 - s["new"] * s["new"])  # (3)
        return da, da, 0, None
    if cell == "rnn_relu":
        da = np.where(s["new"] <= 0, 0, dh)  # (3)
        return da, da, 0, None
    if cell == "gru":
        r, z, n = s["r"], s["z"], s["n"]
        da_n = dh * (1 - z) * (1 - n * n)  # (11)
        da_r = da_n * s["n_h"] * r * (1 - r)  # (12)
        da_z = dh * (s["h"] - n) * z * (1 - z)  # (13)
        gates_x = np.concatenate([da_r, da_z, da_n], -1)  # (14)
        gates_h = np.concatenate([da_r, da_z, da_n * r], -1)
        return gates_x, gates_h, dh * z, None  # (15)
    i, f, g, o = s["i"], s["f"], s["g"], s["o"]
    dm = dh if w["hr"] is None else dh @ w["hr"]  # (23)
    tanh_c = np.tanh(s["new_c"])
    dt = dc + dm * o * (1 - tanh_c * tanh_c)  # (25)
    da_i = dt * g * i * (1 - i)  # (26)
    da_f = dt * s["c"] * f * (1 - f)  # (27)
    da_g = dt * i * (1 - g * g)  # (28)
    da_o = dm * tanh_c * o * (1 - o)  # (29)
    gates = np.concatenate([da_i, da_f, da_g, da_o], -1)  # (30)
    return gates, gates, 0, dt * f


def walk(cell, w, input, sizes, h, c, dh, dc, doutput, *, reverse):
    """Equations 31-33 and 35-36 for one direction.

    Returns:
        output, h_n, c_n, and the gradients: dinput, {weight: dweight}, dh_0, dc_0.
    """
    starts = np.cumsum([0, *sizes])  # (31)
    times = list(range(len(sizes)))
    times = times[::-1] if reverse else times
    h, c = h.copy(), None if c is None else c.copy()
    output, kept = np.empty_like(doutput), {}
    for t in times:
        rows, n = slice(starts[t], starts[t + 1]), sizes[t]
        # Copies, because backward needs the state that entered and the next line overwrites it.
        c_t = None if c is None else c[:n].copy()
        h[:n], new_c, kept[t] = step(cell, w, input[rows], h[:n].copy(), c_t)
        if c is not None:
            c[:n] = new_c  # (32)
        output[rows] = h[:n]  # (33)

    dinput = np.zeros_like(input)
    dw = {k: None if a is None else np.zeros_like(a) for k, a in w.items()}
    dh, dc = dh.copy(), None if dc is None else dc.copy()
    for t in reversed(times):
        rows, n, s = slice(starts[t], starts[t + 1]), sizes[t], kept[t]
        dh_t = dh[:n] + doutput[rows]  # (35)
        gates_x, gates_h, direct, dc_t = gates_backward(
            cell, w, dh_t, None if dc is None else dc[:n], s
        )
        dinput[rows] = gates_x @ w["ih"]  # (4)
        dh[:n] = direct + gates_h @ w["hh"]  # (5), (36)
        if dc is not None:
            dc[:n] = dc_t
        dw["ih"] += gates_x.T @ s["x"]  # (6)
        dw["hh"] += gates_h.T @ s["h"]
        dw["b_ih"] += gates_x.sum(0)
        dw["b_hh"] += gates_h.sum(0)
        if w["hr"] is not None:
            dw["hr"] += dh_t.T @ s["m"]  # (24)
    return output, h, c, dinput, dw, dh, dc
