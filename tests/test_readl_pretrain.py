"What has to hold for `readl_pretrain` as a user runs it: a killed training goes on where it was."
import json, re, subprocess, sys, time

COMMAND = [sys.executable, '-c', 'import sys; from readl_nb.commands import readl_pretrain; sys.exit(readl_pretrain())']

def test_killed_training_goes_on_and_ends(tmp_path):
    out = tmp_path/'training'
    command = [*COMMAND, '--out', str(out), '--stages', 'close:1:1', 'single:40:2:rest', '--save-every', '1', '--workers', '0', '--device', 'cpu']
    with open(tmp_path/'first.log', 'w') as log:
        process = subprocess.Popen(command, stderr=log, stdout=log)
        deadline = time.time() + 300
        while not (out/'state.pt').exists() and process.poll() is None and time.time() < deadline: time.sleep(.05)
        process.kill(); process.wait()
    assert (out/'state.pt').exists(), (tmp_path/'first.log').read_text()[-2000:]
    assert not (out/'model').exists(), 'the training ended before it was killed: the test needs more steps'
    command[command.index('single:40:2:rest')] = 'single:4:2:rest' # a shorter end, so that the test is short
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(re.search(r'(\d+)/5', done.stderr)[1]) >= 1, 'it began again from nothing'
    assert (out/'model'/'model.safetensors').exists()
    steps = [json.loads(line)['step'] for line in open(out/'log.jsonl')]
    assert steps[-1] == 5 and steps == sorted(set(steps))
