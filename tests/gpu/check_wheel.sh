#!/usr/bin/env bash
# The two wheels on a machine with a GPU and its driver: the daemon of tinyserve-cuda serves a pool
# on the GPU, a worker attends there itself by the kernels of the wheel, and metrics and doctor say
# whether MPS shares the GPU. Needs Python with venv, and PyTorch for it.
# check_wheel.sh FOLDER-OF-WHEELS [PYTHON]
set -euo pipefail
wheels=$(cd "$1" && pwd)
python=${2:-python3}
scratch=$(mktemp -d /tmp/tinyserve-gpu-wheel.XXXXXX)
daemon=
end() {
    [ -z "$daemon" ] || { kill "$daemon" && wait "$daemon" || true; } 2>/dev/null
    rm -rf "$scratch"
}
trap end EXIT
cd "$scratch" # no tree is in Python's path
unset TINYSERVE_LIBRARY PYTHONPATH
"$python" -m venv venv
# PyTorch of that Python, which may be of a venv itself.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    >"$(echo venv/lib/python*/site-packages)/outer.pth"
venv/bin/pip install --quiet --no-index --no-deps --disable-pip-version-check \
    "$wheels"/tinyserve-[0-9]*.whl "$wheels"/tinyserve_cuda-*.whl
PATH=$scratch/venv/bin:$PATH
python -m tinyserve.programs
python -m tinyserve.programs | grep -q '^tinyserved .*/_cuda/bin/tinyserved$'
export TINYSERVE_URL=$scratch/s
geometry=layers=2,kv_heads=8,head_dim=128,dtype=bf16,memory=1G
tinyserved --socket "$TINYSERVE_URL" --set log_level=warning --set metrics=127.0.0.1:9471 \
    --pool "p:$geometry,device=cuda:0,client_write=all" &
daemon=$!
tsctl --wait 60 pools | grep -q ' cuda:0 ' || { tsctl pools; exit 1; }
cat >worker.py <<'END'
import sys, torch, tinyserve

torch.manual_seed(7)
q = torch.randn(48, 32, 128, dtype=torch.bfloat16, device="cuda")
k, v = (torch.randn(48, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
outs = {}
for execution in "daemon", "local":
    with tinyserve.connect(execution=execution) as client, client.pool("p", writable=True) as kv:
        client.exchange(kv, 16 << 20)
        with kv.step(kv.create(1), [48], heads=32, io_dtype="bf16") as step:
            for layer in range(2):
                for view, values in ((step.q, q), (step.k, k), (step.v, v)):
                    view.torch().copy_(values)
                step.run(layer, stream=torch.cuda.current_stream())
            torch.cuda.synchronize()
            outs[execution] = step.out.torch().clone()
            step.commit()
        assert client.execution == execution, client.execution
expected = torch.nn.functional.scaled_dot_product_attention(
    *(x.transpose(0, 1)[None].float() for x in (q, k.repeat_interleave(4, 1),
                                                v.repeat_interleave(4, 1))), is_causal=True)
error = (outs["local"].float() - expected[0].transpose(0, 1)).abs().max().item()
assert torch.equal(outs["daemon"], outs["local"]) and error < 0.03, error
print(f"daemon and worker attend with the same bits on {torch.cuda.get_device_name()}; "
      f"largest difference from PyTorch in fp32: {error:.4f}")
END
python worker.py
python - "${CUDA_MPS_PIPE_DIRECTORY:+1}" <<'END'
import sys, urllib.request

text = urllib.request.urlopen("http://127.0.0.1:9471/metrics").read().decode()
told, = (line for line in text.splitlines() if line.startswith("tinyserve_pool_mps{"))
print(told)
assert told == f'tinyserve_pool_mps{{pool="p"}} {int(sys.argv[1] == "1")}'
END
tsctl doctor
tsctl doctor | grep -q "$([ -n "${CUDA_MPS_PIPE_DIRECTORY:-}" ] &&
    echo 'ok       MPS' || echo 'warning  MPS')"
kill "$daemon"
wait "$daemon"
daemon=
echo "the wheels serve a GPU"
