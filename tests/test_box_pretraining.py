"What has to hold for the training of readl-tiny-boxes as a user runs it: killed while it caches or trains, it goes on where it was."
import json, signal, subprocess, sys, time

import torch

COMMAND = '''
import sys
from pathlib import Path
from readl_nb.box_pretraining import BoxPretrainConfig, pretrain_boxes
config = BoxPretrainConfig(images=24, steps=12, batch=4, warmup=2)
pretrain_boxes(sys.argv[1], config, features=sys.argv[2], device='cpu', log_every=1, save_every=2, workers=int(sys.argv[3]))
'''

def start(out, features, workers, log): return subprocess.Popen([sys.executable, '-c', COMMAND, str(out), str(features), str(workers)], stdout=log, stderr=log)

def killed_when(there, process, limit=300):
    deadline = time.time() + limit
    while not there() and process.poll() is None and time.time() < deadline: time.sleep(.02)
    assert process.poll() is None, 'it ended before it was killed'
    process.send_signal(signal.SIGKILL); process.wait()

def test_killed_training_ends_with_the_weights_of_one_that_ran_through(tmp_path):
    from readl_nb.box_pretraining import cache_features
    from readl_nb.models import load_vlm
    with open(tmp_path/'log', 'w') as log:
        features = tmp_path/'features'; cache_features(features, images=1, chunk=4, device='cpu', progress=False) # six small chunks, one of them there
        killed_when(lambda: len(list(features.glob('*.npy'))) >= 3, start(tmp_path/'a', features, 1, log))
        kept = {file.name: file.stat().st_mtime_ns for file in features.glob('*.npy')}
        killed_when((tmp_path/'a/state.pt').exists, start(tmp_path/'a', features, 1, log))
        assert all((features/name).stat().st_mtime_ns == at for name, at in kept.items()), 'a finished chunk was computed again'
        assert not list(tmp_path.glob('a/model/*.safetensors'))
        step = torch.load(tmp_path/'a/state.pt', weights_only=True)['step']
        assert start(tmp_path/'a', features, 0, log).wait(300) == 0, (tmp_path/'log').read_text()[-2000:]
        assert start(tmp_path/'b', features, 0, log).wait(300) == 0
    assert 0 < step < 12
    steps = [json.loads(line)['step'] for line in open(tmp_path/'a/log.jsonl')]
    assert steps == list(range(1, 13))
    one, other = (load_vlm(str(tmp_path/name/'model'), device='cpu').model.state_dict() for name in 'ab')
    assert all(torch.equal(one[name], other[name]) for name in one)
