//! For tests: a wrapper that fails or hangs on command. What it wraps and opens is a real one's work.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use polykey_hsm::{
    BoxFuture, Deadline, KeyMaterial, KeyWrapper, LocalWrapper, MasterKeySource, SlotKind,
    WrapContext, WrapError, WrappedKey, WrapperId, generate_master_key,
};
use tokio::sync::watch;

/// What it does when it is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Up,
    Fails(WrapError),
    /// No answer until the mode is another.
    Hangs,
}

pub(crate) struct Device {
    inner: LocalWrapper,
    mode: watch::Sender<Mode>,
    begun: watch::Sender<usize>,
    opened: AtomicUsize,
}

impl Device {
    pub(crate) fn new() -> Arc<Self> {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        std::fs::write(&path, generate_master_key().unwrap().as_bytes()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        Arc::new(Self {
            inner: LocalWrapper::open(&MasterKeySource::File(path)).unwrap(),
            mode: watch::Sender::new(Mode::Up),
            begun: watch::Sender::new(0),
            opened: AtomicUsize::new(0),
        })
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    pub(crate) fn away(&self) {
        self.set(Mode::Fails(WrapError::Unavailable { retryable: true }));
    }

    /// How often it was asked for anything.
    pub(crate) fn asked(&self) -> usize {
        *self.begun.borrow()
    }

    /// How often it was asked to open something.
    pub(crate) fn opened(&self) -> usize {
        self.opened.load(Ordering::SeqCst)
    }

    /// Waits until it has been asked so often.
    pub(crate) async fn asked_for(&self, times: usize) {
        self.begun.subscribe().wait_for(|begun| *begun >= times).await.unwrap();
    }

    async fn turn(&self) -> Result<(), WrapError> {
        self.begun.send_modify(|begun| *begun += 1);
        let mut mode = self.mode.subscribe();
        let mode = mode.wait_for(|mode| *mode != Mode::Hangs).await.unwrap().clone();
        match mode {
            Mode::Fails(error) => Err(error),
            Mode::Up | Mode::Hangs => Ok(()),
        }
    }
}

impl KeyWrapper for Device {
    fn id(&self) -> &WrapperId {
        self.inner.id()
    }

    fn kind(&self) -> SlotKind {
        self.inner.kind()
    }

    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        Box::pin(async move {
            self.turn().await?;
            self.inner.wrap_key(key, cx, deadline).await
        })
    }

    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
        Box::pin(async move {
            self.opened.fetch_add(1, Ordering::SeqCst);
            self.turn().await?;
            self.inner.unwrap_key(wrapped, cx, deadline).await
        })
    }
}
