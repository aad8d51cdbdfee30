"""Files that a compressed network runs from: written, read back, compared with it, and described by a manifest.

To add a format: a :class:`~ranksearch.deployment.target.Target` with a suffix and two functions, one that writes a
:class:`~ranksearch.deployment.target.Job` and one that reads a runner back, in ``TARGETS``. Folding, the comparison,
hashes and the manifest follow.
"""

from ranksearch.deployment.deploy import NOISE, TARGETS, Deployed, deploy

__all__ = ["NOISE", "TARGETS", "Deployed", "deploy"]
