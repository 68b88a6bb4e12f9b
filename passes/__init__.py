"""The graph passes, one a file, and the order in which they run.

A pass is `run(gm, ctx) -> PassResult`: it edits the GraphModule it is given without changing what that computes,
reports what it did and why it left the rest, and knows no other pass. See fanin_compile.pipeline for what they may
know, and fanin_compile.graph, effects and evaluator for what they share.
"""

from __future__ import annotations

from fanin_compile.passes.compute_active import compute_active
from fanin_compile.passes.condense_conv import condense_conv
from fanin_compile.passes.condense_linear import condense_linear
from fanin_compile.passes.drop_identities import drop_identities
from fanin_compile.passes.find_masked_layers import find_masked_layers
from fanin_compile.passes.fold_batch_norm import fold_batch_norm
from fanin_compile.passes.fold_constant_channels import fold_constant_channels
from fanin_compile.passes.fold_scale import fold_scale
from fanin_compile.passes.fuse_append_attention import fuse_append_attention
from fanin_compile.passes.fuse_cache_write import fuse_cache_write
from fanin_compile.passes.fuse_chain import fuse_chain
from fanin_compile.passes.fuse_epilogue import fuse_epilogue
from fanin_compile.passes.fuse_norm import fuse_norm
from fanin_compile.passes.hold_vectors import hold_vectors
from fanin_compile.passes.join_operators import join_operators
from fanin_compile.passes.lower_cache_attention import lower_cache_attention
from fanin_compile.passes.lower_depthwise import lower_depthwise
from fanin_compile.passes.lower_max_pool import lower_max_pool
from fanin_compile.passes.lower_skinny_linear import lower_skinny_linear
from fanin_compile.passes.recognise_activations import recognise_activations
from fanin_compile.passes.remove_unread_neurons import remove_unread_neurons
from fanin_compile.passes.reuse_residuals import reuse_residuals
from fanin_compile.passes.spell_out_glu import spell_out_glu
from fanin_compile.passes.split_batch import split_batch
from fanin_compile.passes.unflatten_linears import unflatten_linears
from fanin_compile.passes.write_as_linears import write_as_linears
from fanin_compile.pipeline import Pass

PIPELINE: tuple[Pass, ...] = (
    write_as_linears,  # first: the next finds layers in the forms of linears and convolutions
    find_masked_layers,  # every later pass reads the layers and constants it names
    drop_identities,  # they would stand between layers and what the rest looks for
    unflatten_linears,  # before anything that follows activations: flattening views would end the trail
    recognise_activations,  # before anything that looks for activations by name
    spell_out_glu,  # likewise: neurons are followed through products
    fold_batch_norm,  # before constants are followed: one layer less on their way
    fold_scale,  # after batch norms, behind which factors stand; before epilogues, whose residual they hide
    fold_constant_channels,  # on masked layers: it empties columns, which later need not be condensed
    remove_unread_neurons,  # after the fold, by which nobody reads an ablated neuron any more
    condense_linear,
    condense_conv,
    lower_depthwise,  # which of them stand beside condensed ones is known now
    fuse_append_attention,  # after neurons of heads were removed: what follows them knows torch's attention alone
    lower_cache_attention,  # after that one, which appends to the cache
    fuse_cache_write,  # into the attention which that one made
    lower_max_pool,  # before epilogues are fused: an activation costs less after its maximum
    fuse_epilogue,  # it folds what follows into the nodes which those before it made
    fuse_chain,  # of layers whose activation and residual are already theirs
    fuse_norm,  # after chains, whose first layer then takes the norm
    hold_vectors,  # after all that reads vectors as the model's own
    compute_active,  # of layers left dense, which those before it should see as one operator with all its outputs
    lower_skinny_linear,  # after all that asks for linears by torch's name
    split_batch,  # it repeats operators, which those before it should see as one
    reuse_residuals,  # last: passes before it may take a node's value for what it was when it was computed
)

# Behind the pipeline in the backend, where nobody looks at the graph any more.
LOWERING: tuple[Pass, ...] = (join_operators,)
