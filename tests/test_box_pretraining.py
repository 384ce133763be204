"What has to hold for the training of readl-tiny-boxes: killed while it caches or trains, it goes on where it was; new layers change nothing at first; each question is asked behind its layer."
import json, subprocess, sys

import torch
from helpers import kill_when

COMMAND = '''
import sys
from pathlib import Path
from readl_nb.box_pretraining import BoxPretrainConfig, pretrain_boxes
config = BoxPretrainConfig(images=24, steps=12, batch=4, warmup=2)
pretrain_boxes(sys.argv[1], config, features=sys.argv[2], device='cpu', log_every=1, save_every=2, workers=int(sys.argv[3]))
'''

def command(out, features, workers): return [sys.executable, '-c', COMMAND, str(out), str(features), str(workers)]

def test_killed_training_ends_with_the_weights_of_one_that_ran_through(tmp_path):
    from readl_nb.box_pretraining import cache_features
    from readl_nb.models import load_vlm
    features = tmp_path/'features'; cache_features(features, images=1, chunk=4, device='cpu', progress=False) # six small chunks, one of them there
    kill_when(lambda: len(list(features.glob('*.npy'))) >= 3, command(tmp_path/'a', features, 1))
    kept = {file.name: file.stat().st_mtime_ns for file in features.glob('*.npy')}
    kill_when((tmp_path/'a/state.pt').exists, command(tmp_path/'a', features, 1))
    assert all((features/name).stat().st_mtime_ns == at for name, at in kept.items()), 'a finished chunk was computed again'
    assert not list(tmp_path.glob('a/model/*.safetensors'))
    step = torch.load(tmp_path/'a/state.pt', weights_only=True)['step']
    for name in 'ab':
        done = subprocess.run(command(tmp_path/name, features, 0), capture_output=True, text=True, timeout=300); assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < step < 12
    steps = [json.loads(line)['step'] for line in open(tmp_path/'a/log.jsonl')]
    assert steps == list(range(1, 13))
    one, other = (load_vlm(str(tmp_path/name/'model'), device='cpu').model.state_dict() for name in 'ab')
    assert all(torch.equal(one[name], other[name]) for name in one)

def spoken(vlm, image, steps=40):
    "Tokens chosen one by one without a cache of keys and values"
    from readl_nb.models import prepare
    ids = []
    with torch.no_grad():
        for _ in range(steps):
            logits = vlm.model(**prepare(vlm, [image], completions=[ids] if ids else None), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == vlm.tokenizer.eos_token_id: break
    return ids

def test_a_deepened_model_is_the_old_one_until_it_learns_and_saves_as_any_other(tmp_path):
    from readl_nb.box_pretraining import deepen
    from readl_nb.models import load_vlm, prepare, respond
    from readl_nb.pretraining import save_vlm
    from readl_nb.samples import generate_sample
    vlm, image = load_vlm(device='cpu'), generate_sample(5, defect='hole').image; batch = prepare(vlm, [image])
    with torch.no_grad():
        before = vlm.model(**batch).logits
        for places in ((2, 5), (1,), (4,), (1, 2, 3)):
            deep = deepen(load_vlm(device='cpu').model, places)
            assert torch.equal(deep(**batch).logits, before) and len(deep.model.language_model.layers) == 4 + len(places)
    deepen(vlm.model); generator = torch.Generator().manual_seed(0)
    for place in (2, 5): # new layers that have learned something
        for last in (vlm.model.model.language_model.layers[place].self_attn.o_proj, vlm.model.model.language_model.layers[place].mlp.down_proj): torch.nn.init.normal_(last.weight, std=.02, generator=generator)
    save_vlm(vlm.model, tmp_path/'six'); loaded = load_vlm(str(tmp_path/'six'), device='cpu')
    config = json.loads((tmp_path/'six/config.json').read_text())['text_config']
    assert config['num_hidden_layers'] == 6 and config['layer_types'] == ['full_attention'] * 6
    assert loaded.model.state_dict().keys() == vlm.model.state_dict().keys()
    with torch.no_grad(): logits = loaded.model(**batch).logits
    assert not torch.allclose(logits, before, atol=1e-2)
    with torch.no_grad(): assert torch.allclose(logits, vlm.model(**batch).logits, atol=1e-4)
    answer = respond(loaded, [image], max_new_tokens=12)[0] # with the cache, each layer its own place in it
    assert [n for n in spoken(loaded, image, 12) if n != vlm.tokenizer.eos_token_id] == list(answer.token_ids)

def test_each_question_is_asked_behind_its_layer():
    from readl_nb import box_pretraining as P
    config = P.BoxPretrainConfig(images=8, steps=4, batch=2, bfloat16=False)
    model, helpers, _ = P.beginning(config, 'cpu'); heard, asked = {}, {}
    layers = model.model.language_model.layers; assert len(layers) == 6
    for n, layer in enumerate(layers): layer.register_forward_hook(lambda module, given, out, n=n: heard.__setitem__(n, (out[0] if isinstance(out, tuple) else out).detach()))
    for name in ('where', 'cell', 'corner'): getattr(helpers, name).register_forward_hook(lambda module, given, out, name=name: asked.__setitem__(name, given[0].detach()))
    boxes = P.Box(28, 56, 84, 112, 'hole'), P.Box(300, 10, 320, 120, 'dent'); ids, weights, places = (torch.tensor(part)[None] for part in P.box_target(P.box_text(boxes)))
    batch = dict(tokens=torch.randn(1, 2, 225, 128), ids=ids, weights=weights, places=places, cells=P.cell_targets(boxes)[None], corners=P.corner_targets(places[0], boxes)[None])
    P.box_losses(model, 'two', batch, helpers)
    first, second = P.image_spans('two')
    assert torch.equal(asked['where'], torch.cat([heard[1][:, first], heard[1][:, second]])) # both images
    assert torch.equal(asked['cell'], heard[2][:, second]) # the image to inspect
    assert torch.equal(asked['corner'], heard[4][:, -ids.shape[1]:]) # the places that predict each token of the text
