# Sourced by the launch files of this folder, from the repository's root; `args` are the arguments of train/pretrain.py.

python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=${PYTHON:-python}

# The value of the last `key=value` of `args`, or what is given instead.
value() { # key, default
    local found=$2 arg
    for arg in "${args[@]}"; do
        [[ $arg != "$1="* ]] || found=${arg#*=}
    done
    printf '%s\n' "$found"
}

# A run that was started goes on: of `args` only what a resumed run may change is kept.
resume_if_started() {
    local folder arg kept
    folder=$(value folder "")
    [[ -n $folder && -e $folder/config.yaml ]] || return 0
    kept=("resume=$folder")
    for arg in "${args[@]}"; do
        case $arg in
            optim.name=*) ;;
            trainer.*=* | optim.*=* | logger.*=* | tokens=*) kept+=("$arg") ;;
        esac
    done
    args=("${kept[@]}")
}

# Run a command, or with DRY_RUN=1 print it.
run() {
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# The same in the place of this shell, so that signals reach the command.
become() {
    [[ ${DRY_RUN:-0} == 1 ]] || exec "$@"
    run "$@"
}

fail() {
    echo "error: $1" >&2
    exit 2
}
