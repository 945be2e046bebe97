"""Synthetic long-context tasks: the answers are in the sequence, exact, from a seed.

A sequence is a context, a question and an answer. The question is `ASK name` for each
thing that is asked, the answer `TELL name` with what is to be told, in the same order.
Names in the answer's form are given, the tokens behind them are judged: a greedy
decoder that is given the names finds an answer exactly if each of its tokens is the
likeliest after the true ones before it.

Answers of all tasks are `ANSWER` tokens long, filled up in front by noise, so that
every task has its prompt end at the same position.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ASK, TELL, MOST = 0, 1, 2
NOISE = range(3, 16)
NAMES = range(16, 40)
VALUES = range(40, 56)
WORDS = range(56, 72)
VOCAB_SIZE = 72

ANSWER = 12  # tokens, of the longest
ASKED = 4  # of `multi`
HOPS = 3
MIN_LENGTH = 64


class Task(NamedTuple):
    """What fills a sequence, and how it is judged.

    Attributes:
      draw: `(rng, length, num)` gives tokens int32 `[num, length]`.
      judged: int `[ANSWER]`; 0 for a token that is given, `i` for one of answer `i`,
        which is right if all its tokens are.
    """

    draw: Callable[[np.random.Generator, int, int], np.ndarray]
    judged: np.ndarray


def num_names(length: int) -> int:
    """How many names the longer tasks have: more in a longer sequence."""
    return min(max(length // 32, ASKED), 16 if length < 8192 else len(NAMES))


def single(rng: np.random.Generator, length: int, num: int) -> np.ndarray:
    """One name with its value, in noise: what is its value?"""
    names, values = _sample(rng, NAMES, num, 1), _draw(rng, VALUES, (num, 1))
    return _retrieval(rng, length, names, values, asked=1)


def multi(rng: np.random.Generator, length: int, num: int) -> np.ndarray:
    """Many names with their values, in noise: what are the values of some?"""
    pairs = num_names(length)
    names, values = _sample(rng, NAMES, num, pairs), _draw(rng, VALUES, (num, pairs))
    return _retrieval(rng, length, names, values, asked=ASKED)


def hops(rng: np.random.Generator, length: int, num: int) -> np.ndarray:
    """Names that stand for names that stand for a value: follow one to its end."""
    chains = num_names(length) // (HOPS + 1)
    names = _sample(rng, NAMES, num, chains * HOPS).reshape(num, chains, HOPS)
    ends = _draw(rng, VALUES, (num, chains, 1))
    meanings = np.concatenate([names[..., 1:], ends], axis=-1)
    flat = (num, chains * HOPS)
    context = _scattered(
        rng, length - ANSWER - 2, names.reshape(flat), meanings.reshape(flat)
    )
    of_first = np.concatenate([names[:, 0, :1], meanings[:, 0]], axis=-1)
    return _assembled(rng, context, names[:, 0, :1], of_first[:, None])


def words(rng: np.random.Generator, length: int, num: int) -> np.ndarray:
    """Words in disorder, one at least three times as often as each other: which?"""
    room = length - ANSWER - 2
    rare = room // (len(WORDS) + 2)
    order = _sample(rng, WORDS, num, len(WORDS))
    counts = [room - rare * (len(WORDS) - 1)] + [rare] * (len(WORDS) - 1)
    context = rng.permuted(np.repeat(order, counts, axis=1), axis=1)
    most = np.full((num, 1), MOST)
    return _assembled(rng, context, most, np.stack([most, order[:, :1]], axis=-1))


def _judged(asked: int, told: int) -> np.ndarray:
    """For `asked` answers of `told` tokens."""
    answers = np.arange(1, asked + 1)[:, None] * ([0, 0] + [1] * told)
    return np.pad(answers.ravel(), (ANSWER - answers.size, 0))


TASKS = {
    "single": Task(single, _judged(1, 1)),
    "multi": Task(multi, _judged(ASKED, 1)),
    "hops": Task(hops, _judged(1, HOPS)),
    "words": Task(words, _judged(1, 1)),
}


def draw(task: str, length: int, num: int, seed: tuple[int, ...]) -> np.ndarray:
    """Draws sequences of a task: tokens int32 `[num, length]`.

    Raises:
      ValueError: if `length` leaves no room for a context.
    """
    if length < MIN_LENGTH:
        raise ValueError(f"`length` must be at least {MIN_LENGTH}; got {length}.")
    rng = np.random.default_rng((*seed, list(TASKS).index(task)))
    return TASKS[task].draw(rng, length, num).astype(np.int32)


def accuracy(task: str, tokens: np.ndarray, predicted: np.ndarray) -> float:
    """The share of answers that are right.

    Args:
      task: which one.
      tokens: `[num, length]`, or their last `ANSWER`.
      predicted: likewise, the token that was expected at each position.
    """
    judged = TASKS[task].judged
    right = tokens[:, -ANSWER:] == predicted[:, -ANSWER:]
    answers = range(1, judged.max() + 1)
    return float(np.mean([right[:, judged == i].all(axis=1) for i in answers]))


def _retrieval(rng, length, names, values, asked):
    context = _scattered(rng, length - ANSWER - 2 * asked, names, values)
    told = np.stack([names, values], axis=-1)[:, :asked]
    return _assembled(rng, context, names[:, :asked], told)


def _assembled(rng, context, asked, told) -> np.ndarray:
    """Context, question and answer: `told` is `[num, answers, tokens]`."""
    num = len(context)
    question = np.stack([np.full_like(asked, ASK), asked], axis=-1).reshape(num, -1)
    tell = np.full((*told.shape[:2], 1), TELL)
    answer = np.concatenate([tell, told], axis=-1).reshape(num, -1)
    filling = _draw(rng, NOISE, (num, ANSWER - answer.shape[1]))
    return np.concatenate([context, question, filling, answer], axis=1)


def _scattered(rng, room, firsts, seconds) -> np.ndarray:
    """Pairs in noise, in any order, with a token of noise at least behind each."""
    num, pairs = firsts.shape
    context = _draw(rng, NOISE, (num, room))
    slots = rng.random((num, _num_slots(room))).argsort(axis=1)[:, :pairs]
    rows = np.arange(num)[:, None]
    context[rows, 3 * slots], context[rows, 3 * slots + 1] = firsts, seconds
    return context


def _num_slots(room: int) -> int:
    return room // 3


def _sample(rng, tokens: range, num: int, size: int) -> np.ndarray:
    """Different tokens in each row, `[num, size]`."""
    return rng.permuted(np.tile(tokens, (num, 1)), axis=1)[:, :size]


def _draw(rng, tokens: range, shape) -> np.ndarray:
    return rng.integers(tokens.start, tokens.stop, shape)


def recall(
    rng: np.random.Generator, length: int, num: int, pairs: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Names with their values again and again: no task, but practice for all of them.

    Nearly every second token is to be told, not a few of them as in the tasks, so that
    a model finds out soon how to look up what a name was followed by.

    Returns:
      Tokens int32 and bools `[num, length]`: the values of names that came before.
    """
    names, values = _sample(rng, NAMES, num, pairs), _draw(rng, VALUES, (num, pairs))
    at = rng.integers(0, pairs, (num, -(-length // 2)))
    before = np.cumsum(np.eye(pairs, dtype=np.int32)[at], axis=1)
    again = np.take_along_axis(before, at[..., None], axis=2)[..., 0] > 1
    stream = np.stack(
        [np.take_along_axis(x, at, axis=1) for x in (names, values)], axis=-1
    )
    counted = np.stack([np.zeros_like(again), again], axis=-1)
    flat = (num, -1)
    return (
        stream.reshape(flat)[:, :length].astype(np.int32),
        counted.reshape(flat)[:, :length],
    )
