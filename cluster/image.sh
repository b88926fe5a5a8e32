#!/usr/bin/env bash
# `make docker` and `make docker-demo`: builds the image of the Dockerfile, and runs the demo in it.
#
#   image.sh build [docker build option ...]
#   image.sh demo METHOD [key=value ...]       METHOD topd or opd; the rest are fields of the config
#
#   DEVICE=cpu|gpu           unset, gpu where nvidia-smi lists a GPU
#   IMAGE=name               unset, topd-ray:$DEVICE
#   BASE=image               build: another base image than the Dockerfile's, best with its digest
#   PIP_CONFIG_FILE, PIP_CERT   build: pip's configuration and certificates, given to the build as secrets
#   RUNS=folder              demo: where run folders go; unset, runs/
#   SHM_SIZE=size            demo: most of shared memory, in which Ray's object store lives; unset, half of the memory
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LOG=build/docker.log
# Disk of a first build in MiB: the packages twice (their own stage, then the image) and what pip keeps (rounded up).
readonly CPU_MIB=8000 GPU_MIB=25000

fail() {  # fail WHAT [WHAT WOULD BE RIGHT ...]
    printf 'docker stopped: %s\n' "$1" >&2
    shift
    (($# == 0)) || printf '  %s\n' "$@" >&2
    exit 1
}

choose_device() {
    if [[ -z ${DEVICE:-} ]]; then
        DEVICE=cpu
        ! timeout 20 nvidia-smi -L 2> /dev/null | grep -q '^GPU' || DEVICE=gpu
    fi
    [[ $DEVICE == cpu || $DEVICE == gpu ]] ||
        fail "DEVICE=$DEVICE is unknown." "Right would be DEVICE=cpu, DEVICE=gpu, or neither."
    readonly DEVICE IMAGE=${IMAGE:-topd-ray:$DEVICE}
}

check_docker() {
    local answer
    command -v docker > /dev/null ||
        fail "docker is not installed." "Debian 12: apt-get install docker.io. Ubuntu: apt-get install docker.io docker-buildx."
    answer=$(docker version --format '{{.Server.Version}}' 2>&1) && return
    if [[ $answer == *"permission denied"* ]]; then
        fail "$(id -un) may not use Docker." "Let an administrator run: usermod --append --groups docker $(id -un)"
    fi
    fail "no Docker daemon answers: ${answer##*$'\n'}" "Start it (systemctl start docker), or set DOCKER_HOST."
}

there() { docker image inspect "$IMAGE" > /dev/null 2>&1; }

check_disk() {  # a first build; later ones add what changed
    local root free need=$CPU_MIB
    [[ $DEVICE == cpu ]] || need=$GPU_MIB
    root=$(docker info --format '{{.DockerRootDir}}')
    # A daemon in a virtual machine or on another host has a disk of its own.
    if [[ ! -d $root ]] || there; then return; fi
    free=$(df -Pm "$root" | awk 'NR == 2 { print $4 }')
    ((free >= need)) ||
        fail "too little disk: $root has $free MiB free, a first build for $DEVICE needs about $need MiB." \
            "Free some (docker system prune), or move Docker's data-root to a larger disk."
}

explain() {  # one line for what the build's log says went wrong
    if grep -qi 'no space left on device' "$LOG"; then
        echo "the disk is full"
    elif grep -q 'set-up stopped: ' "$LOG"; then
        sed -n 's/.*set-up stopped: //p' "$LOG" | tail -1
    elif grep -q 'buildx component is missing' "$LOG"; then
        echo "docker has no BuildKit: install its buildx plugin (docker-buildx or docker-buildx-plugin)"
    elif grep -qE 'failed to do request|pull access denied|failed to resolve|manifest unknown|not found$' "$LOG"; then
        echo "a base image or a package cannot be fetched: $(grep -E '(ERROR|error|failed)' "$LOG" | tail -1)"
    else
        tail -1 "$LOG"
    fi
}

build() {  # build [docker build option ...]
    local options=(--build-arg "DEVICE=$DEVICE" --build-arg "REVISION=$(git describe --always --dirty 2> /dev/null)")
    [[ -z ${BASE:-} ]] || options+=(--build-arg "${DEVICE^^}_BASE=$BASE")
    [[ ! -s ${PIP_CONFIG_FILE:-} ]] || options+=(--secret "id=pip.conf,src=$PIP_CONFIG_FILE")
    [[ ! -s ${PIP_CERT:-} ]] || options+=(--secret "id=ca,src=$PIP_CERT")
    check_disk
    mkdir -p "${LOG%/*}"
    DOCKER_BUILDKIT=1 docker build --progress=plain "${options[@]}" --tag "$IMAGE" "$@" . 2>&1 | tee "$LOG" ||
        fail "$(explain)." "All that docker said: $LOG"
    docker image inspect --format "$IMAGE: {{.Size}} bytes, built in $SECONDS s" "$IMAGE"
}

demo() {  # demo METHOD [key=value ...]
    local method=${1:?topd or opd} runs options answer shm
    shift
    there || fail "there is no image $IMAGE." "Make it: make docker DEVICE=$DEVICE"
    runs=$(realpath -m "${RUNS:-runs}")
    if ! mkdir -p "$runs" 2> /dev/null || [[ ! -w $runs ]]; then
        fail "$(id -un) cannot write to $runs." "RUNS=folder names another one."
    fi
    # As large as Linux makes /dev/shm outside containers. Ray puts an object store that does not fit there on the disk.
    shm=${SHM_SIZE:-$(awk '/^MemTotal:/ { print int($2 / 2) "k" }' /proc/meminfo)}
    # No network: models and prompts are in the image. Ray warns that it sees none, and goes on. The caller's ids:
    # the run folder is the caller's own.
    options=(--rm --network none --shm-size "$shm" --cap-drop ALL --security-opt no-new-privileges
        --user "$(id -u):$(id -g)" --env HF_HUB_OFFLINE=1 --volume "$runs:/opt/topd/runs")
    [[ $DEVICE == cpu ]] || options+=(--gpus all)
    if ! answer=$(docker run "${options[@]}" --entrypoint test "$IMAGE" -w runs 2>&1); then
        case $answer in
            *"could not select device driver"* | *nvidia-container* | *"nvidia.com/gpu"*)
                fail "Docker cannot hand GPUs on: ${answer%%$'\n'*}" \
                    "Install NVIDIA's container toolkit, then: nvidia-ctk runtime configure --runtime=docker" ;;
            "") fail "$(id -u):$(id -g) cannot write to $runs from inside a container." \
                "Rootless Docker, user namespaces and network disks map ids: RUNS=folder names another one." ;;
            *) fail "no container starts: ${answer%%$'\n'*}" ;;
        esac
    fi
    exec docker run "${options[@]}" "$IMAGE" run jobs/demo.yaml \
        "run.name=docker-$method" "objective.method=$method" "$@"
}

main() {
    local task=${1:-}
    [[ $task == build || $task == demo ]] ||
        fail "$task is no task." "Right would be: image.sh build [option ...], or image.sh demo METHOD [key=value ...]"
    choose_device
    check_docker
    "$task" "${@:2}"
}

main "$@"
