"""The definition of `active_ffn`: gather the active rows, two products."""

import jax
import jax.numpy as jnp


def active_ffn(
    x: jax.Array,
    gate: jax.Array,
    indices: jax.Array,
    num_active: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    """As the public function, by gathers."""
    valid = jnp.arange(indices.size) < num_active
    rows = jnp.where(valid, indices, 0)
    # a padded row is not multiplied by 0 but replaced: it may hold inf
    up_rows = jnp.where(valid[:, None], up[rows], 0)
    down_rows = jnp.where(valid[:, None], down[rows], 0)
    dots = jnp.einsum(
        "bi,ci->bc", x, up_rows, precision="highest", preferred_element_type=jnp.float32
    )
    hidden = jnp.where(valid, gate.astype(jnp.float32) * dots, 0)
    out = jnp.einsum(
        "bc,cm->bm", hidden, down_rows.astype(jnp.float32), precision="highest"
    )
    return out.astype(x.dtype)
