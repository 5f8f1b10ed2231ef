"""A pipeline stage that tells the watchdog where it is."""

from typing import Any

from torch.distributed.pipelining import PipelineStage

from mlm_train.parallel.health.progress_marker import ProgressMarker


class MarkedStage(PipelineStage):
    """A pipeline stage that marks the micro-batch which it computes or waits for."""

    def __init__(self, marker: ProgressMarker, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marker = marker

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self.marker.at("forward", self.stage_index, fwd_chunk_id)
        with self.marker.forwards.running():
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self.marker.at("waiting after forward", self.stage_index, fwd_chunk_id)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not self.has_backward:  # in evaluation
            return None
        self.marker.at("backward", self.stage_index, bwd_chunk_id)
        output = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self.marker.at("waiting after backward", self.stage_index, bwd_chunk_id)
        return output

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if not self.has_backward:
            return None
        self.marker.at("weights' backward", self.stage_index, bwd_chunk_id)
        output = super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        self.marker.at("waiting after weights' backward", self.stage_index, bwd_chunk_id)
        return output

    # Where a rank holds two neighbouring stages (zbv, dualpipe_v), torch passes gradients from one to the
    # other in evaluation too, where there are none, and fails.
    def get_local_bwd_output(self, mb_index: int) -> Any:
        return super().get_local_bwd_output(mb_index) if self.has_backward else None

    def set_local_bwd_input(self, next_stage_bwd_outputs: Any, mb_index: int) -> None:
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[Any]:
        return self._marked(super().get_fwd_recv_ops(fwd_chunk_id), "activation", fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[Any]:
        return self._marked(super().get_bwd_recv_ops(bwd_chunk_id), "gradient", bwd_chunk_id)

    def _marked(self, operations: list[Any], what: str, micro_batch: int) -> list[Any]:
        if operations:
            self.marker.at(f"receive {what}", self.stage_index, micro_batch)
        return operations
