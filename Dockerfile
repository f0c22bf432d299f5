# The image of every pod: head, workers of both kinds, and what submits jobs (configs/cluster/kuberay/).
#
#   docker build --tag registry.example.com/revision-ray:0.1.0 .
#   docker build --build-arg FLAVOUR=cpu --tag registry.example.com/revision-ray:0.1.0-cpu .   # no CUDA toolkit
#
# The versions are those of constraints.txt, with which the tests ran. A pip.conf of your own comes as a secret, which
# leaves no trace in the image: docker build --secret id=pip.conf,src=pip.conf ...

ARG FLAVOUR=gpu
# Ray and Python as in constraints.txt: a test compares them.
FROM rayproject/ray:2.60.0-py311-${FLAVOUR}

WORKDIR /home/ray/project

# Dependencies in a layer of their own: a change of the code alone does not install them again.
COPY --chown=1000:100 pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' \
        > /tmp/requirements.txt \
    && python -m pip install --no-cache-dir --constraint constraints.txt --requirement /tmp/requirements.txt

COPY --chown=1000:100 . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python -m pip install --no-cache-dir --no-deps --editable .

# Without a token Ray does not start: nobody runs an open cluster by mistake.
ENV RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    OMP_WAIT_POLICY=passive

# By number, so that Kubernetes can tell that it is not root.
USER 1000
