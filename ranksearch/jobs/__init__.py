"""Searches as jobs on a Ray cluster: what is sent, the cluster's job server, and what runs there."""

from __future__ import annotations

from ranksearch.jobs.client import LOCAL, Job, JobServer, token
from ranksearch.jobs.parcel import Parcel, wrap

__all__ = ["LOCAL", "Job", "JobServer", "Parcel", "token", "wrap"]
