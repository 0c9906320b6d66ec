# Sourced by the set-ups of this folder. make_venv: makes venv/ in the current folder, with PyTorch
# from PyPI and pytest, and sets `pip` to the command that installs into it. PyPI's PyTorch for
# Linux links CUDA's libraries; without a GPU, stubs stand in for them (cuda_stubs.py). With
# TS_ENGINES_CUDA=1 they are installed (3 GB more).
torch=2.13.0
engines=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv_stamp="$torch ${TS_ENGINES_CUDA:-0} $(cksum <"$engines/cuda_stubs.py")"

make_venv() {
    python3 -m venv venv
    pip=(venv/bin/python -m pip install --quiet --disable-pip-version-check)
    if [ "${TS_ENGINES_CUDA:-0}" = 1 ]; then
        "${pip[@]}" "torch==$torch"
    else
        "${pip[@]}" --no-deps "torch==$torch"
        "${pip[@]}" filelock typing-extensions sympy networkx jinja2 fsspec 'setuptools>=77'
        python3 "$engines/cuda_stubs.py" venv/lib/python3.*/site-packages/torch/lib
    fi
    "${pip[@]}" --no-deps numpy pytest xxhash
    "${pip[@]}" iniconfig packaging pluggy pygments psutil pyyaml
}
