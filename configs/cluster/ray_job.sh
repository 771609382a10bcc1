#!/bin/bash
# Encode a data set into a latent store as a job of a Ray cluster (docs/scale.md), from any machine that reaches its
# dashboard:
#
#   RAY_ADDRESS=http://HEAD:8265 bash configs/cluster/ray_job.sh VAE DATA OUT --resolution 256 --actors 64
#
# All nodes have ldm-vae installed and see VAE, DATA and OUT under these names: absolute ones of a shared file system, or
# URLs. The driver runs on the head node, beside no actor's GPU, and Ray tells it the cluster. A job that was stopped, or
# whose head node was lost, goes on when it is submitted again. `ray job stop` is Ctrl-C.

set -euo pipefail
: "${RAY_ADDRESS:?expected the URL of the dashboard, as http://HEAD:8265}"
exec ray job submit --address "$RAY_ADDRESS" -- ldm-vae encode "$@" --engine ray
