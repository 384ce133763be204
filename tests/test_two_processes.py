"`readl_train` under `accelerate launch` on two CPU processes (gloo): no sample lost, the rewards of one process, one line a step; and weights split by FSDP."
import json, os, subprocess, sys
from collections import Counter
import pandas as pd
import pytest
from readl_nb.scaling import launch_file

STEPS, PROMPTS, G = 2, 4, 2
SETTINGS = f'''
generations: {G}
prompts_per_step: {PROMPTS}
micro_batch: 2
max_new_tokens: 64
temperature: 1.5
learning_rate: 0.0  # the weights stay, so that rewards can be computed again
max_steps: {STEPS}
save_steps: {STEPS}
'''

# The command, and beside it what each process was asked to reward: which image, which tokens, what it gave. And the random state with which it began to write.
RECORDING = '''
import hashlib, json, os, sys
import torch, transformers
from readl_nb import commands, rewards
notes, states = (open(os.path.join(os.environ['NOTES'], os.environ.get('RANK', '0') + end), 'w') for end in ('.jsonl', '.states'))
generate = transformers.GenerationMixin.generate
def watched(*arguments, **options):
    print(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(), file=states, flush=True)
    return generate(*arguments, **options)
transformers.GenerationMixin.generate = watched
reward = rewards.ConsistencyReward.__call__
def noted(self, completion_ids, path, label, trainer_state=None, log_extra=None, **inputs):
    extra = {}
    def keep(name, values): extra[name] = list(values); log_extra and log_extra(name, values)
    values = reward(self, completion_ids=completion_ids, label=label, log_extra=keep, **inputs)
    if trainer_state is not None and log_extra:
        for n, ids in enumerate(completion_ids):
            line = dict(step=trainer_state.global_step + 1, path=path[n], label=int(label[n]), ids=list(map(int, ids)), reward=float(values[n]), problem=extra['consistency_problem'][n], jaccard=float(extra['jaccard'][n]))
            print(json.dumps(line), file=notes, flush=True)
    return values
rewards.ConsistencyReward.__call__ = noted
sys.exit(commands.readl_train())
'''

def launch(folder, name, starter, data):
    "Starts a run; [process, folder of the run, folder of the notes]."
    out, notes = folder/name, folder/f'{name}_notes'
    notes.mkdir()
    command = [*starter, str(folder/'recording.py'), '--method', 'cgro', '--data', str(data), '--out', str(out), '--config', str(folder/'settings.yaml')]
    with open(folder/f'{name}.log', 'w') as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, 'NOTES': str(notes)}), out, notes

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "name -> folder of the run, what its processes rewarded: {rank: lines}, their random states: {rank: lines}. One run on two processes, one on one."
    from readl_nb.samples import CATEGORIES, DEFECTS, generate_sample
    folder = tmp_path_factory.mktemp('two'); data = folder/'data'
    for n in range(12):
        sample = generate_sample(60_000 + n, CATEGORIES[n % 3], DEFECTS[n % 7] if n % 2 else 'good')
        place = data/CATEGORIES[n % 3]/'train'/('good' if n % 2 == 0 else DEFECTS[n % 7].replace(' ', '_'))
        place.mkdir(parents=True, exist_ok=True); sample.image.save(place/f'{n:03}.png')
    (folder/'settings.yaml').write_text(SETTINGS); (folder/'recording.py').write_text(RECORDING)
    accelerate = [sys.executable, '-m', 'accelerate.commands.launch', '--config_file', launch_file('cpu')]
    found = {}
    for name, starter in (('two', accelerate), ('one', [sys.executable])):
        process, out, notes = launch(folder, name, starter, data)
        assert process.wait(300) == 0, (folder/f'{name}.log').read_text()[-4000:]
        lines = {path: path.read_text().splitlines() for path in sorted(notes.iterdir())}
        found[name] = out, {path.stem: [json.loads(line) for line in rows] for path, rows in lines.items() if path.suffix == '.jsonl'}, {path.stem: rows for path, rows in lines.items() if path.suffix == '.states'}
    return found

def test_each_process_has_its_share_and_no_sample_is_lost(runs):
    (_, two, _), (_, one, _) = runs['two'], runs['one']
    assert list(two) == ['0', '1'] and list(one) == ['0']
    for step in range(1, STEPS + 1):
        shares = [[line for line in lines if line['step'] == step] for lines in two.values()]
        assert [len(share) for share in shares] == [PROMPTS * G // 2] * 2
        together, alone = (Counter(line['path'] for lines in run.values() for line in lines if line['step'] == step) for run in (two, one))
        assert together == alone, 'two processes see other images than one'
        assert sorted(together.values()) == [G] * PROMPTS, 'an image is there more or less often than its group is large'
    assert len({line['path'] for line in one['0']}) == STEPS * PROMPTS, 'no image comes twice before all were there'

def test_processes_draw_different_random_numbers(runs):
    "With equal ones the groups of the two processes would be copies of each other wherever the image is the same."
    first, second = runs['two'][2].values()
    assert len(first) == len(second) == 1 + STEPS
    assert first[0] == second[0], 'the dry run is that of one process, and every process takes part'
    assert not set(first[1:]) & set(second[1:]), 'two processes sample with the same random numbers'

def test_rewards_are_those_that_one_process_gives(runs):
    from readl_nb.attention import capture
    from readl_nb.images import read_image
    from readl_nb.inspection import score_tokens
    from readl_nb.models import as_response, end_token_ids, load_vlm
    from readl_nb.rewards import accuracy_reward, consistency_reward, format_reward
    out, noted, _ = runs['two']
    lines = [line for share in noted.values() for line in share]
    vlm = load_vlm(device='cpu'); ends = end_token_ids(vlm)
    responses = [as_response(vlm.tokenizer, line['ids'], ends) for line in lines]
    attention = capture(vlm, [read_image(line['path']) for line in lines], responses)
    expected = []
    for line, response, seen in zip(lines, responses, attention):
        weights = [0.] * len(seen) if response.problem else score_tokens(seen).weights
        found = consistency_reward(seen.maps, weights, line['label'], problem=response.problem)
        assert (line['problem'], line['reward']) == (found.problem, found.reward)
        assert (found.jaccard is None and line['jaccard'] != line['jaccard']) or abs(found.jaccard - line['jaccard']) < 1e-6
        expected.append((line['step'], line['path'], format_reward(response.text, response.truncated), accuracy_reward(response.text, line['label'], response.truncated), found.reward))
    table = pd.concat([pd.read_parquet(path) for path in sorted((out/'completions').glob('*.parquet'))])
    assert len(table) == STEPS * PROMPTS * G
    logged = list(zip(table['step'], table['path'], table['format'], table['accuracy'], table['consistency']))
    assert sorted(logged) == sorted(expected), 'the table of completions holds other rewards'
    assert {line['jaccard'] == line['jaccard'] for line in lines} >= {True}, 'no completion was well formed: nothing was compared'
    metrics = [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]
    for line in metrics:
        for n, part in enumerate(('format', 'accuracy', 'consistency'), 2):
            mean = sum(row[n] for row in expected if row[0] == line['step']) / (PROMPTS * G)
            assert abs(line[f'reward/{part}'] - mean) < 1e-6

def test_every_step_is_written_once(runs):
    for out, *_ in runs.values():
        metrics = [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]
        assert [line['step'] for line in metrics] == list(range(1, STEPS + 1))
        assert (out/'adapter'/'adapter_model.safetensors').is_file()
    keys = [set(json.loads((out/'metrics.jsonl').read_text().splitlines()[0])) for out, *_ in runs.values()]
    assert keys[0] == keys[1]

# accelerate splits weights on GPUs only; its own function for it, with the plugin that fsdp.yaml makes, also works between CPU processes.
SPLIT = '''
import os, torch
from dataclasses import replace
from types import SimpleNamespace
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from peft import get_peft_model
from torch.distributed.fsdp import register_fsdp_forward_method
from trl.trainer.utils import add_fused_lm_head
from readl_nb.grpo import CGROConfig, Evidence, each_image_once, lora_config
from readl_nb.models import Prompt, load_vlm, prepare
from readl_nb.samples import generate_sample

dist.init_process_group('gloo'); rank = dist.get_rank()
config = CGROConfig(lora_rank=4, max_new_tokens=30)

def built():
    vlm = load_vlm(device='cpu'); torch.manual_seed(0)
    model = get_peft_model(vlm.model, lora_config(config)); each_image_once(model)
    add_fused_lm_head(model.get_base_model(), outputs=('log_probs', 'entropy'))
    for name, weight in model.named_parameters():
        if 'lora_B' in name: torch.nn.init.normal_(weight, std=.02)
    return replace(vlm, model=model.eval())

whole, split = built(), built()
watching = [Evidence(vlm, config).watch(vlm.model) for vlm in (whole, split)]
plugin = FullyShardedDataParallelPlugin()
stub = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision='no', is_main_process=rank == 0, device=torch.device('cpu'), parallelism_config=None)
fsdp2_prepare_model(stub, split.model); register_fsdp_forward_method(split.model, 'generate')
mine = sum(p.to_local().numel() for p in split.model.parameters()); everything = sum(p.numel() for p in whole.model.parameters())
assert mine < .6 * everything, (mine, everything)

image = generate_sample(60_000 + rank).image; inputs = prepare(whole, [image] * 2, Prompt(config.question))
# as many tokens on both processes: under FSDP 2 transformers does not let the one that ends first wait for the other
torch.manual_seed(rank); expected = whole.model.generate(**inputs, min_new_tokens=30, max_new_tokens=30, do_sample=True, top_k=0)
torch.manual_seed(rank); written = split.model.generate(**inputs, min_new_tokens=30, max_new_tokens=30, do_sample=True, top_k=0)
assert torch.equal(expected, written), 'the split model samples something else'
ids = [row[:20 + 10 * rank] for row in written[:, inputs['input_ids'].shape[1]:].tolist()]   # passes over texts of any length are no trouble
for again in (False, True):   # kept while sampling, then from one more pass
    a, b = (seen([image] * 2, ids) for seen in watching)
    assert max((x.maps - y.maps).abs().max() for x, y in zip(a, b) if len(x)) < 1e-6, 'the split model looks elsewhere'

full = prepare(whole, [image] * 2, Prompt(config.question), completions=ids); labels = full['input_ids'].clone(); labels[:, :-20] = -100
probabilities = [vlm.model(**full, labels=labels, fused_lm_head=True).log_probs for vlm in (whole, split)]
assert (probabilities[0] - probabilities[1]).abs().max() < 1e-4
for p in probabilities: p.sum().backward()
for (name, a), (_, b) in zip(whole.model.named_parameters(), split.model.named_parameters()):
    assert (a.grad is None) == (b.grad is None), name
    if a.grad is None: continue
    dist.all_reduce(a.grad); a.grad /= 2   # FSDP gives the mean over the processes
    assert torch.allclose(a.grad, b.grad.full_tensor(), atol=1e-4, rtol=1e-3), name
if rank == 0: print('split as whole')
dist.destroy_process_group()
'''

def test_weights_split_by_fsdp_sample_look_and_learn_as_whole_ones(tmp_path):
    (tmp_path/'split.py').write_text(SPLIT)
    done = subprocess.run([sys.executable, '-m', 'accelerate.commands.launch', '--config_file', launch_file('fsdp'), '--num_processes', '2', str(tmp_path/'split.py')],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert 'split as whole' in done.stdout
