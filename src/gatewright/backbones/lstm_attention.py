"""Attention of a recurrent decoder to the source, and the two layers of 2017 that stand at the bottom."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from gatewright.backbones.lstm import State
from gatewright.parts.draws import fold
from gatewright.parts.dropout import dropped


class Source(NamedTuple):
    """What a decoder attends to: `states` [B, P, D], the attention's `keys` of them [B, P, N], and the
    source's `mask` [B, P] or none.
    """

    states: Float[Tensor, "B P D"]
    keys: Float[Tensor, "B P N"]
    mask: Bool[Tensor, "B P"] | None


class SourceAttention(nn.Module):
    """A(x_i, y_j) = sum_d V_d tanh((x_i U)_d) tanh((y_j W)_d), a softmax over i, and the mean of the x_i.

    Equation: Shazeer et al. 2017, 22; with matrices in place of GNMT's sum over tanh(x_i U + y_j W) (21), all
    source positions are one product. `u`, `w` [N, D], `v` [N].
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(hidden, width))
        self.w = nn.Parameter(torch.empty(hidden, width))
        self.v = nn.Parameter(torch.empty(hidden))
        for weight in (self.u, self.w):
            nn.init.normal_(weight, std=width**-0.5)
        nn.init.normal_(self.v, std=hidden**-0.5)

    def source(self, states: Float[Tensor, "B P D"], mask: Bool[Tensor, "B P"] | None) -> Source:
        """Return the source with its keys V tanh(x U), which are the same for every target position."""
        return Source(states, self.v * torch.tanh(F.linear(states, self.u)), mask)

    def forward(self, y: Float[Tensor, "B D"], source: Source) -> Float[Tensor, "B D"]:
        """Return what each target attends to at one position; padding gets none."""
        scores = torch.einsum("bpn,bn->bp", source.keys, torch.tanh(F.linear(y, self.w)))
        if source.mask is not None:
            scores = scores.masked_fill(~source.mask, -torch.inf)
        return torch.einsum("bp,bpd->bd", torch.softmax(scores, -1), source.states)


class AttendedLSTM(nn.Module):
    """x + drop(LSTM([x, context])), the context of position t by the LSTM's own output at t - 1: [B, S, D].

    Equation: Wu et al. 2016, 4, the bottom layer of the decoder; that of 2017 alone receives the context. One
    position follows another, and the empty state before the first attends evenly.
    """

    def __init__(self, width: int, lstm_width: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout, self.attention = dropout, SourceAttention(width, width)
        projected = width if lstm_width else 0
        self.lstm = nn.LSTM(2 * width, lstm_width or width, proj_size=projected, batch_first=True)

    def empty(self, x: Float[Tensor, "B P D"]) -> State:
        """Return the state before the first position, ([B, D], [B, cells])."""
        return x.new_zeros(len(x), x.shape[-1]), x.new_zeros(len(x), self.lstm.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "B S D"],
        source: Source,
        state: State,
        key: Int64[Tensor, ""] | None = None,
    ) -> tuple[Float[Tensor, "B S D"], State]:
        """Return the output and the state after the last position."""
        own: Any = self.lstm
        # Columns of the token, then of the context: the token's share of all positions is one product.
        of_x, of_context = own.weight_ih_l0.split(x.shape[-1], dim=1)
        again = torch.cat([of_context, own.weight_hh_l0], dim=1)
        (h, c), rows = state, []
        with torch.autocast(x.device.type, enabled=False):
            sums = F.linear(x.to(again.dtype), of_x, own.bias_ih_l0 + own.bias_hh_l0)
            for gates in sums.unbind(1):
                seen = torch.cat([self.attention(h, source), h], dim=-1)
                i, f, g, o = (gates + F.linear(seen, again)).chunk(4, dim=-1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                h = F.linear(h, own.weight_hr_l0) if own.proj_size else h
                rows.append(h)
        y = torch.stack(rows, dim=1)
        if self.training and self.dropout:
            y = dropped(y, self.dropout, key)
        return x + y, (h, c)


class TwoWayLSTM(nn.Module):
    """x + drop(LSTM(x)) + drop(LSTM from the other end(x)), [B, P, D]: the bottom of an encoder.

    The other end is each source's own last token: padding, on the right, changes nothing.
    """

    def __init__(self, width: int, lstm_width: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout, projected = dropout, width if lstm_width else 0
        self.forwards = nn.LSTM(width, lstm_width or width, proj_size=projected, batch_first=True)
        self.backwards = nn.LSTM(width, lstm_width or width, proj_size=projected, batch_first=True)

    def forward(
        self,
        x: Float[Tensor, "B P D"],
        mask: Bool[Tensor, "B P"] | None = None,
        key: Int64[Tensor, ""] | None = None,
    ) -> Float[Tensor, "B P D"]:
        """Return the output at every position."""
        with torch.autocast(x.device.type, enabled=False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")
            wide = x.to(next(self.forwards.parameters()).dtype)
            y = self.forwards(wide)[0]
            z = turned(self.backwards(turned(wide, mask))[0], mask)
        if self.training and self.dropout:
            y, z = (
                dropped(one, self.dropout, None if key is None else fold(key, place))
                for place, one in enumerate((y, z))
            )
        return x + y + z


def turned(x: Float[Tensor, "B P D"], mask: Bool[Tensor, "B P"] | None) -> Float[Tensor, "B P D"]:
    """Return every text from its last token to its first, padding left where it stands."""
    if mask is None:
        return x.flip(1)
    places, lengths = torch.arange(x.shape[1], device=x.device), mask.sum(1, keepdim=True)
    order = torch.where(places < lengths, lengths - 1 - places, places)
    return x.gather(1, order.unsqueeze(-1).expand_as(x))
