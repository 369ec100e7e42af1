#!/usr/bin/env bash
# usage: ./run.sh [TRACK] [--name=value ...]    train; the flags go to train_gpt.py (--help lists them)
#        ./run.sh test [pytest arguments]       run the tests (no GPU needed); ./run.sh help prints this
#
# tracks:
#   tiny     (the default) the documentation inside your Python: no GPU, no download, minutes
#   race300  300 steps of short at its own batches, to compare two ideas on one GPU in two minutes
#   short    FineWeb to 3.28 validation loss, GPT-2 small
#   medium   FineWeb to 2.92 validation loss, GPT-2 medium
#
# The first run installs requirements.txt into .venv beside this script. Data is made or fetched, unless
# --data=FOLDER is given. One process is started per visible GPU (NPROC=n: n processes), or one on the CPU.
# Without arguments, a text is sampled at the end. PYTHON=path names the Python (3.10+) that makes .venv.

set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
venv=$here/.venv python=$here/.venv/bin/python
stamp=$venv/setup.stamp # what was installed, or 'unfinished' while an installation is under way
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 # 'user = true' in a pip.conf would bypass .venv
PATH=${PATH//"$venv/bin:"/} # python3 must not mean an activated .venv, which may have to be made anew

die() { echo "run.sh: $*" >&2; exit 2; }

stop() { again=1 stopped=1; kill "-$1" $(jobs -p) 2>/dev/null || exit 130; } # to what `run` runs, if it does
for name in HUP INT TERM; do trap "stop $name" $name; done

# Runs a command in a process group of its own: Ctrl-C reaches it once, from here, not from the terminal too.
run() {
    local again=1 stopped='' status=0
    set -m
    "$@" </dev/null &
    set +m
    while ((again)); do again=0 && wait $! && status=0 || status=$?; done 2>/dev/null # signals end wait
    [[ -z $stopped ]] || exit "$status"
    return "$status"
}

installed() { [[ -x $python && $(cat -- "$stamp" 2>/dev/null) == "$kind $hash" ]]; }

# Makes .venv; anew if an installation was interrupted, or was for another kind of machine.
install() {
    local index='' torch found query=("$python" -m pip index versions torch --retries 0 --timeout 5)
    "$outer" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "'$outer' is no Python 3.10 or newer: set PYTHON=path to one"
    [[ ! -e $venv/pyvenv.cfg || -e $stamp ]] || die "$venv was not made by run.sh: move it away"
    echo "setup: installing into $venv, once (or waiting for another run.sh that does)"
    mkdir -p -- "$venv" && exec 9>>"$venv/setup.lock" || return
    run flock 9 2>/dev/null || true # some systems have none
    if installed; then return; fi
    if [[ ! -x $python || $(cat -- "$stamp" 2>/dev/null) != "$kind "* ]]; then
        echo unfinished >"$stamp" && find "$venv" -mindepth 1 ! -name 'setup.*' -delete || return
        run "$outer" -m venv "$venv" || return
    fi
    torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$here/requirements.txt")
    found=$("${query[@]}" 2>/dev/null) && [[ $found == *"$torch"* ]] || return # no package index answers
    echo unfinished >"$stamp"
    set -- -r "$here/requirements.txt"
    if [[ $kind == cpu ]]; then
        set -- "$@" --no-compile # compiled files serve torch.compile, which only GPUs use
        if [[ $found != *"$torch+cpu"* ]]; then # PyPI's build brings 5 GB of CUDA libraries
            index=--extra-index-url=https://download.pytorch.org/whl/cpu
            found=$(timeout 9 "${query[@]}" $index 2>/dev/null)
        fi
        if [[ $found == *"$torch+cpu"* ]]; then set -- "$@" "torch==$torch+cpu" $index; fi
    fi
    run "$python" -m pip install "$@" && echo "$kind $hash" >"$stamp.new" && mv -f -- "$stamp.new" "$stamp"
}

# Sets python to .venv's, or to the one outside if nothing can be installed and that one has torch.
set_up() {
    local kind=cpu hash outer=${PYTHON:-python3}
    hash=$(cksum <"$here/requirements.txt")
    if ((gpus)) || grep -qs '^gpu ' "$stamp"; then kind=gpu; fi # torch for GPUs runs without one, too
    if ! installed && ! install; then
        "$outer" -c 'import torch; assert torch.__version__ >= (2, 11)' 2>/dev/null ||
            die "cannot install, and '$outer' has no torch 2.11: connect to a network, or set PYTHON=path"
        echo "setup: cannot install; '$outer' has torch and is used instead"
        python=$outer
    fi
    exec 9>&- # unlocks
    echo "setup: $SECONDS s"
}

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ' || true)
track=tiny arguments=$# data=''
if (($#)) && [[ $1 != --* || $1 == --help ]]; then track=$1 && shift; fi
case $track in
    help | -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    tiny) data=sample.py ;;
    race300) data='fineweb.py 2' ;;
    short) data='fineweb.py 9' ;;
    medium) data='fineweb.py 22' ;;
    test)
        set_up
        if ((!$#)); then set -- -n 2 --dist loadfile --no-loadscope-reorder; fi
        cd -- "$here"
        OMP_NUM_THREADS=1 exec "$python" -m pytest -q "$@" ;;
    *) die "'$track' is no track or command: use tiny, race300, short, medium, test or help" ;;
esac
[[ " $* " != *" --track"* ]] || die "the track comes first, without --track=: ./run.sh short"
case " $* " in *" --help "*) data='' NPROC=1 ;; *" --data"[=\ ]*) data='' ;; esac
IFS=, read -ra visible <<<"${CUDA_VISIBLE_DEVICES-}"
[[ $gpus == 0 || -z ${CUDA_VISIBLE_DEVICES+set} ]] || gpus=${#visible[@]}
asked=${NPROC:-$gpus} processes=1
[[ $asked =~ ^(0|[1-9][0-9]*)$ ]] || die "NPROC=$asked is no number: try NPROC=1"
for n in 2 4 $((asked / 8 * 8)); do ((n == 0 || n > asked)) || processes=$n; done
((asked <= processes)) || echo "run.sh: $processes processes, not $asked: it takes 1, 2, 4 or a multiple of 8"
set_up
[[ -z $data ]] || run "$python" "$here/data/"$data
command=("$python")
if ((processes > 1)); then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes))}
    command+=(-m torch.distributed.run --standalone "--nproc_per_node=$processes")
fi
command+=("$here/train_gpt.py" "--track=$track")
if ((!gpus)); then export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}; fi # long spinning slows busy machines
((arguments)) && exec "${command[@]}" "$@"
run "${command[@]}"
exec "$python" "$here/evaluate.py" "--sample=The module "
