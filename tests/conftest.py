"""Several host devices, for the tests of sharding: set before JAX starts."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
