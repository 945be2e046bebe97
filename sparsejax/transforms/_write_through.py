"""Edits an optimizer's new state before the optimizer computes its updates from it.

RigL takes no step when it refreshes its masks: the inner state stays as it was, and the
updates are dropped. Selected behind `inner.update`, that would leave two versions of
every moment, the one that the updates were computed from and the one that is kept, and
XLA on a CPU would copy the moments between refreshes too. Here the selection happens
where a new moment is defined, so that there is only one. It must not change updates
that are used: between refreshes every edit is the identity, on a refresh none are used.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from sparsejax._jaxpr import bind, evaluate, is_literal

Edit = Callable[[jax.Array], jax.Array]


def update_from_edited_state(
    update: Callable[[], tuple[Any, Any]], edits: Sequence[Edit]
) -> tuple[Any, Any]:
    """Evaluates `update()` with its new state edited before it is used.

    Args:
      update: returns `(updates, state)`; traced once.
      edits: one for each leaf of the new state.

    Returns:
      The updates and the edited state.
    """
    closed, shapes = jax.make_jaxpr(update, return_shape=True)()
    updates_tree, state_tree = (jax.tree.structure(shape) for shape in shapes)
    num_updates = updates_tree.num_leaves
    edited = dict(enumerate(edits, start=num_updates))
    # a value that is two outputs, or no output of an equation, is edited at the end
    positions: dict[Any, int | None] = {}
    for position, var in enumerate(closed.jaxpr.outvars):
        if not is_literal(var):
            positions[var] = None if var in positions else position
    done = set()

    def run(eqn, operands):
        outs = list(bind(eqn, operands))
        for i, var in enumerate(eqn.outvars):
            position = positions.get(var)
            edit = None if position is None else edited.get(position)
            if edit is not None:  # not an update
                outs[i] = edit(outs[i])
                done.add(position)
        return outs

    outs = evaluate(closed, [], run)
    for position, edit in edited.items():
        if position not in done:
            outs[position] = edit(outs[position])
    return (
        updates_tree.unflatten(outs[:num_updates]),
        state_tree.unflatten(outs[num_updates:]),
    )
