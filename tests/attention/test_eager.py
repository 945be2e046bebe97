"""What has a loop, called without jit, compiles once."""

import functools

import jax
import jax.numpy as jnp
import pytest

from sparsejax import attention, ops

X = jnp.ones((1, 16, 2, 4))
FFN = jnp.ones((1, 4)), jnp.ones((1, 8)), jnp.arange(8), 5, jnp.ones((9, 4))
EAGER = {
    "attention_peaks": lambda: ops.attention_peaks(X, X, block=4),
    "seer_target": lambda: attention.seer_target(X, X, block=4),
    "seer_decode_target": lambda: attention.seer_decode_target(X, X, block=4),
    "sparsed": lambda: attention.sparsed(X, X, num_generated=4, block_shape=(4, 4)),
} | {
    f"active_ffn {name}": functools.partial(
        ops.active_ffn, *FFN, FFN[-1], implementation=name
    )
    for name in ("xla", None)
}


@pytest.fixture
def compiled():
    """A list that gets an entry for each program that is compiled."""
    seen = []

    def listen(event, seconds, **kwargs):
        del seconds
        if event.endswith("backend_compile_duration"):
            seen.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", EAGER)
def test_compiles_once(name, compiled):
    EAGER[name]()
    compiled.clear()
    EAGER[name]()
    assert not compiled
    jax.jit(lambda x: x + 1)(X)
    assert len(compiled) == 1
