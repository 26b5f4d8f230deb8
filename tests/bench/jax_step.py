"""jax_privacy's clipped sum of the CNN of dp_table.py. Runs in an interpreter that has jax_privacy.

`python jax_step.py '[side, first channels, second channels, classes, batch]'` prints the CPU seconds of its clipped sum
and of its plain gradient, compiled, medians in a process with one thread. See dp_table.py.
"""

# pyright: reportMissingImports=false

import json
import os
import statistics
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax.numpy as jnp
import numpy as np
from jax_privacy.clipping import clipped_grad

SIDE, FIRST, SECOND, CLASSES, BATCH = json.loads(sys.argv[1])
TIMES = 15


def conv(x, w, b):
    """A convolution of the same size, channels first."""
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME") + b[:, None, None]


def pool(x):
    """Averages of 2 x 2."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))


def loss(p, x, y):
    """Mean cross-entropy."""
    x = pool(jnp.tanh(conv(x.reshape(-1, 1, SIDE, SIDE), p["w1"], p["b1"])))
    x = pool(jnp.tanh(conv(x, p["w2"], p["b2"])))
    scores = jax.nn.log_softmax(x.reshape(len(x), -1) @ p["w3"] + p["b3"])
    return -jnp.take_along_axis(scores, y[:, None], 1).mean()


def seconds(step, *arguments):
    """Median CPU seconds of a call, compilation apart."""
    jax.block_until_ready(step(*arguments))
    taken = []
    for _ in range(TIMES):
        start = time.process_time()
        jax.block_until_ready(step(*arguments))
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def main():
    """Measure and print."""
    rng = np.random.default_rng(0)  # noqa: TID251 - public made-up data
    shapes = {
        "w1": (FIRST, 1, 5, 5), "b1": (FIRST,), "w2": (SECOND, FIRST, 3, 3), "b2": (SECOND,),
        "w3": (SECOND * (SIDE // 4) ** 2, CLASSES), "b3": (CLASSES,),
    }  # fmt: skip
    p = {name: jnp.asarray(0.1 * rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(rng.standard_normal((BATCH, SIDE * SIDE)), jnp.float32)
    y = jnp.asarray(rng.integers(0, CLASSES, BATCH))
    private = jax.jit(clipped_grad(loss, l2_clip_norm=0.5, batch_argnums=(1, 2)))
    print(json.dumps({"private": seconds(private, p, x, y), "plain": seconds(jax.jit(jax.grad(loss)), p, x, y)}))


main()
