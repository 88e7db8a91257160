"""Hypothesis strategies for expert loads and the sizes of a placement."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

KINDS = (
    st.integers(0, 3).map(float),  # ties and zeros
    st.just(1.0),
    st.integers(0, 2**24 + 3).map(float),
    st.floats(0, 100, width=32),
    st.floats(0, 2.0**127, width=32),
)


@st.composite
def sizes(draw: st.DrawFn, most_experts: int = 24) -> tuple[int, int, int, int, int]:
    """Experts, replicas, groups, nodes, GPUs, all that divide as they have to."""
    nodes = draw(st.integers(1, 3))
    gpus = nodes * draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 3))
    experts = groups * draw(st.integers(1, max(1, most_experts // groups)))
    fewest = -(-experts // gpus)
    return experts, gpus * draw(st.integers(fewest, fewest + 3)), groups, nodes, gpus


@st.composite
def loads(draw: st.DrawFn, experts: int, most_layers: int = 3) -> np.ndarray:
    shape = (draw(st.integers(1, most_layers)), experts)
    return draw(hnp.arrays(np.float64, shape, elements=draw(st.sampled_from(KINDS))))


@st.composite
def problems(draw: st.DrawFn, most_experts: int = 24) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Loads, and replicas, groups, nodes and GPUs for them, in the order of the published arguments."""
    experts, *others = draw(sizes(most_experts))
    return draw(loads(experts)), tuple(others)
