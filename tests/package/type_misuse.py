"""A program in which a type checker must find every mistake."""

# A program where each line with a comment is wrong, and what pyright calls that. Of a function with
# overloads it names the argument too.
MISUSE = """
import jax.numpy as jnp, softmax_jax
from softmax_jax import derivatives, enable_forward_mode, linear_softmax_cross_entropy as linear
from softmax_jax import log_softmax, logsumexp, softmax, softmax_cross_entropy
from softmax_jax import chunked_softmax_cross_entropy, softmax_kl_divergence
from softmax_jax import softmax_cross_entropy_with_integer_labels
from softmax_jax.verify import check_derivatives

x, labels, weight = jnp.ones((2, 3)), jnp.zeros(2, int), jnp.ones((3, 4))

softmax("logits")  # reportArgumentType
softmax([1.0, 2.0])  # reportArgumentType
softmax(x, axis="classes")  # reportArgumentType
log_softmax(x, axes=0)  # reportCallIssue
log_softmax(x, -1, None, "vocab")  # reportCallIssue
probability: float = softmax(x)  # reportAssignmentType
log: jnp.ndarray = logsumexp(x, return_sign=True)  # reportAssignmentType
softmax_cross_entropy(x)  # reportCallIssue
softmax_kl_divergence(x)  # reportCallIssue
linear(x, weight, labels, reduction="average")  # reportArgumentType reportCallIssue
softmax_cross_entropy_with_integer_labels(x, labels, label_smooting=0.1)  # reportCallIssue
softmax_cross_entropy_with_integer_labels(x, labels).nll  # reportAttributeAccessIssue
softmax_cross_entropy(x, x, return_aux=True).mean()  # reportAttributeAccessIssue
softmax_cross_entropy(x, x, return_aux=True)[1].logits  # reportAttributeAccessIssue
linear(x, weight, labels, vocab_axis="last")  # reportArgumentType reportCallIssue
linear(x, weight, labels, None)  # reportCallIssue
linear(x, weight, labels).nll  # reportAttributeAccessIssue
linear(x, weight, labels, sample_weights="all")  # reportArgumentType reportCallIssue
derivatives.softmax_jvp(x)  # reportCallIssue
derivatives.softmax_hessian(x)  # reportAttributeAccessIssue
softmax_jax.verifier  # reportAttributeAccessIssue
chunked_softmax_cross_entropy(weight, weight, x, labels)  # reportArgumentType reportCallIssue
enable_forward_mode(x)  # reportArgumentType
enable_forward_mode(softmax, tangent="rule")  # reportArgumentType
enable_forward_mode(softmax)("logits")  # reportArgumentType
check_derivatives(x, x)  # reportArgumentType
check_derivatives(softmax, x, check=["vjp"])  # reportCallIssue
report = check_derivatives(softmax, x)
report.passed  # reportAttributeAccessIssue
ok: bool = report  # reportAssignmentType
good = report.rows[0].status == "good"  # reportUnnecessaryComparison
report.rows = ()  # reportAttributeAccessIssue
"""
