//! etcd: worker leases, task locks and epochs, guarded writes, the flow store, checkpoints and holds.
