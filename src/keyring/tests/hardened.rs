//! Hardened keys: one call at first use, remembered for a time, and a backend that comes and goes.

use std::path::Path;

use futures::future::join_all;
use polykey_hsm::{KeyWrapper, LocalWrapper, MasterKeySource, WrapError, generate_master_key};
use polykey_proto::polykey::record::v1::AuditEvent;
use polykey_storage::Store;

use super::*;
use crate::command::crypto::{Bound, Decrypt, Encrypt, Form, Hidden, Sealed, Sign, ToSign};
use crate::config::Hardened;
use crate::custody::backends::Trouble;
use crate::custody::breaker::Terms;
use crate::custody::device::{Device, Mode};
use crate::custody::{Custody, Pace, SlotSpec};

const MINUTES: Duration = Duration::from_secs(300);
const TERMS: Terms = Terms {
    failures: 3,
    look: Duration::from_millis(20),
    patience: Duration::from_secs(5),
    again: Duration::from_millis(20),
};

/// The keyring with a device for its hardened keys.
fn with(device: &Arc<Device>, cache: Duration) -> impl FnOnce(Keyring) -> Keyring {
    let device = Arc::clone(device);
    move |keyring| {
        let config = Hardened { wrapper: "dev".into(), cache };
        let backends = Backends::new(Some(&config), &[], keyring.vault.node_id());
        backends.add("dev", device as _, TERMS);
        keyring.with_backends(Arc::new(backends))
    }
}

async fn node(cache: Duration) -> (Node, Arc<Device>) {
    let device = Device::new();
    (Node::over(with(&device, cache)).await, device)
}

fn of_tier(mut cx: Context, tier: &str) -> Context {
    let caller = Arc::make_mut(&mut cx.caller);
    let facts = Arc::make_mut(&mut caller.facts);
    tier.clone_into(&mut facts.tier);
    // Another tier is another revision of the record: decisions are remembered by it.
    facts.revision = 2 + tier.len() as u64;
    cx
}

fn hardened() -> CreateKey {
    CreateKey { profile: Some(Profile::Hardened), ..creation() }
}

impl Node {
    fn pro(&self) -> Context {
        of_tier(self.cx("a", "user"), "pro")
    }

    async fn make(&self, command: CreateKey) -> KeyId {
        let made = self.do_it(&self.pro(), Mutation::Create(Box::new(command))).await;
        made.unwrap().key.id
    }

    async fn seal(&self, id: KeyId) -> Result<Vec<u8>, Error> {
        let command = Encrypt {
            key: KeyName::Id(id),
            version: 0,
            plaintext: Hidden(bytes::Bytes::from_static(b"plain")),
            bound: Bound::default(),
            form: Form::Blob,
        };
        self.keyring.encrypt(&self.pro(), &command).await.map(|done| done.ciphertext)
    }

    async fn opens(&self, ciphertext: &[u8]) -> Result<(), Error> {
        let command = Decrypt {
            key: None,
            ciphertext: Sealed::Blob(ciphertext.to_vec().into()),
            bound: Bound::default(),
        };
        let opened = self.keyring.decrypt(&self.pro(), &command).await?;
        assert_eq!(opened.plaintext.as_slice(), b"plain");
        Ok(())
    }

    fn open_keys(&self) -> usize {
        self.keyring.caches.opened()
    }
}

fn unavailable<T: std::fmt::Debug>(result: Result<T, Error>) {
    match result {
        Err(Error::Unavailable { retry_after, .. }) => assert!(!retry_after.is_zero()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_first_use_asks_once_and_what_is_not_secret_asks_never() {
    let (node, device) = node(MINUTES).await;
    let cx = node.pro();
    let id = node.make(hardened()).await;
    let made = device.asked();
    assert_eq!((made, device.opened()), (2, 1), "wrapped, and opened once to be sure");
    let record = &node.keyring.load(id).await.unwrap().record;
    assert_eq!(record.storage_profile, 2);
    let blob = node.get(&cx, id, 0).await.unwrap().metadata.version.blob.clone();
    node.keyring.caches.clear();
    assert_eq!(node.get(&cx, id, 0).await.unwrap().metadata.version.blob, blob);
    let described =
        GetMetadata { key: KeyName::Id(id), version: 0, history: false, policies: false };
    node.keyring.metadata(&cx, &described).await.unwrap();
    node.keyring.list(&cx, &ListKeys::default()).await.unwrap();
    assert_eq!(device.asked(), made);

    let ciphertext = node.seal(id).await.unwrap();
    for _ in 0..10 {
        node.opens(&ciphertext).await.unwrap();
    }
    assert_eq!((device.asked(), node.open_keys()), (made + 1, 1));
}

#[tokio::test]
async fn callers_at_once_share_one_call_and_one_that_gives_up_ends_it_for_nobody() {
    let (node, device) = node(MINUTES).await;
    let id = node.make(hardened()).await;
    let made = device.asked();
    device.set(Mode::Hangs);
    tokio::select! {
        biased;
        done = node.seal(id) => panic!("{done:?}"),
        () = device.asked_for(made + 1) => {}
    }
    let all = join_all((0..20).map(|_| node.seal(id)));
    let release = async {
        tokio::task::yield_now().await;
        device.set(Mode::Up);
    };
    let (sealed, ()) = tokio::join!(all, release);
    assert!(sealed.iter().all(Result::is_ok));
    assert_eq!(device.asked(), made + 1);
}

#[tokio::test]
async fn with_a_cache_of_zero_each_use_asks_and_nothing_is_kept() {
    let (node, device) = node(Duration::ZERO).await;
    let id = node.make(hardened()).await;
    let made = device.asked();
    for n in 1..=3 {
        node.seal(id).await.unwrap();
        assert_eq!((device.asked(), node.open_keys()), (made + n, 0));
    }
}

#[tokio::test]
async fn what_is_remembered_ends_with_its_time_whether_anybody_asks_or_not() {
    let (node, device) = node(MINUTES).await;
    let signing = CreateKey {
        algorithm: Algorithm::EcdsaP384,
        purpose: polykey_hsm::Purpose::Sign,
        ..hardened()
    };
    let (id, signer) = (node.make(hardened()).await, node.make(signing).await);
    let sign = |cx: Context| {
        let node = &node;
        async move {
            let command = Sign {
                key: KeyName::Id(signer),
                version: 0,
                input: ToSign::Message(Hidden(bytes::Bytes::from_static(b"m"))),
                scheme: None,
            };
            node.keyring.sign(&cx, &command).await.map(drop)
        }
    };
    node.seal(id).await.unwrap();
    for _ in 0..2 {
        sign(node.pro()).await.unwrap();
    }
    let asked = device.asked();
    assert_eq!(node.open_keys(), 2);
    let now = std::time::Instant::now();
    node.keyring.caches.sweep(now + MINUTES / 2);
    assert_eq!(node.open_keys(), 2, "its time is not over");
    node.keyring.caches.sweep(now + MINUTES * 2);
    assert_eq!(node.open_keys(), 0);
    // Not the parsed private key either.
    device.away();
    unavailable(sign(node.pro()).await);
    device.set(Mode::Up);
    node.seal(id).await.unwrap();
    sign(node.pro()).await.unwrap();
    assert_eq!(device.asked(), asked + 3);
}

#[tokio::test]
async fn a_time_that_is_over_counts_before_it_is_swept() {
    let (node, device) = node(Duration::from_millis(1)).await;
    let id = node.make(hardened()).await;
    node.seal(id).await.unwrap();
    let asked = device.asked();
    tokio::time::sleep(Duration::from_millis(2)).await;
    node.seal(id).await.unwrap();
    assert_eq!(device.asked(), asked + 1);
}

#[tokio::test]
async fn every_change_of_a_key_forgets_it() {
    let (node, device) = node(MINUTES).await;
    let id = node.make(hardened()).await;
    let other = node.make(hardened()).await;
    let ciphertext = node.seal(id).await.unwrap();
    node.seal(other).await.unwrap();
    node.do_it(&node.pro(), Mutation::Disable(on(id))).await.unwrap();
    assert_eq!(node.open_keys(), 1, "the other key's stays");
    let asked = device.asked();
    let refused = node.opens(&ciphertext).await;
    assert!(matches!(refused, Err(Error::State(Reason::KeyDisabled))), "{refused:?}");
    assert_eq!(device.asked(), asked, "nobody is asked for what is refused anyway");
    node.do_it(&node.pro(), Mutation::Enable(on(id))).await.unwrap();
    node.opens(&ciphertext).await.unwrap();
    assert_eq!((device.asked(), node.open_keys()), (asked + 1, 2));
    node.do_it(&node.pro(), revoke(id, None)).await.unwrap();
    assert_eq!(node.open_keys(), 1);
    node.keyring.caches.clear();
    assert_eq!(node.open_keys(), 0, "as the lock of the node does");
}

#[tokio::test]
async fn a_key_that_is_revoked_during_the_call_gives_nothing_and_is_not_kept() {
    let (node, device) = node(MINUTES).await;
    let id = node.make(hardened()).await;
    device.set(Mode::Hangs);
    let asked = device.asked();
    let change = async {
        device.asked_for(asked + 1).await;
        node.do_it(&node.pro(), revoke(id, None)).await.unwrap();
        device.set(Mode::Up);
    };
    let (sealed, ()) = tokio::join!(node.seal(id), change);
    assert!(matches!(sealed, Err(Error::State(Reason::KeyRevoked))), "{sealed:?}");
    assert_eq!(node.open_keys(), 0);
}

#[tokio::test]
async fn while_the_backend_is_away_what_is_open_goes_on_and_standard_keys_notice_nothing() {
    let (node, device) = node(MINUTES).await;
    let cx = node.pro();
    let (open, closed) = (node.make(hardened()).await, node.make(hardened()).await);
    let ciphertext = node.seal(open).await.unwrap();
    let backends = Arc::clone(node.keyring.backends.as_ref().unwrap());
    for gone in [Mode::Hangs, Mode::Fails(WrapError::Unavailable { retryable: true })] {
        device.set(gone.clone());
        let asked = device.asked();
        let waiting = tokio::spawn({
            let keyring = Arc::clone(&node.keyring);
            let cx = node.pro();
            async move {
                let command = Mutation::Create(Box::new(hardened()));
                keyring.mutate(&cx, &command, None).await.map(drop)
            }
        });
        device.asked_for(asked + 1).await;
        // All of this is done while that one waits.
        let standard = node.key(&cx).await;
        let theirs = node.seal(standard).await.unwrap();
        node.opens(&theirs).await.unwrap();
        node.opens(&ciphertext).await.unwrap();
        node.get(&cx, closed, 0).await.unwrap();
        device.away();
        unavailable(waiting.await.unwrap());
        for _ in 0..3 {
            unavailable(node.seal(closed).await);
        }
        assert_eq!(backends.trouble(), Some(("dev".to_owned(), Trouble::Away)));
        // Open: neither keys nor versions are made, and nobody is asked by callers.
        let before = node.keyring.list(&cx, &ListKeys::default()).await.unwrap().total;
        unavailable(node.do_it(&cx, Mutation::Create(Box::new(hardened()))).await);
        unavailable(node.do_it(&cx, rotate(open, Strategy::Hot, 0)).await);
        let after = node.keyring.list(&cx, &ListKeys::default()).await.unwrap().total;
        assert_eq!(before, after);
        node.opens(&ciphertext).await.unwrap();

        device.set(Mode::Up);
        let back = async {
            while backends.trouble().is_some() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), back).await.unwrap();
        node.seal(closed).await.unwrap();
        node.keyring.caches.clear();
        node.seal(open).await.unwrap();
    }
}

#[tokio::test]
async fn a_refusal_and_damage_are_told_apart_and_open_no_breaker() {
    let (node, device) = node(MINUTES).await;
    let id = node.make(hardened()).await;
    for _ in 0..5 {
        device.set(Mode::Fails(WrapError::Refused("the key is disabled".into())));
        let refused = node.seal(id).await;
        assert!(matches!(refused, Err(Error::State(Reason::BackendRefused))), "{refused:?}");
        device.set(Mode::Fails(WrapError::Broken));
        assert!(matches!(node.seal(id).await, Err(Error::DataLoss { .. })));
    }
    device.set(Mode::Up);
    node.seal(id).await.unwrap();
}

#[tokio::test]
async fn the_tier_in_the_record_decides_and_a_request_cannot_take_what_it_does_not_give() {
    let (node, _device) = node(MINUTES).await;
    let (none, standard, asked) = (None, Some(Profile::Standard), Some(Profile::Hardened));
    for (tier, role, profile, expected) in [
        ("", "user", none, Some(1)),
        ("free", "user", none, Some(1)),
        ("pro", "user", none, Some(2)),
        ("enterprise", "user", none, Some(2)),
        ("pro", "user", standard, Some(1)),
        ("pro", "user", asked, Some(2)),
        ("free", "user", asked, None),
        // By permission.
        ("free", "admin", asked, Some(2)),
        ("free", "admin", none, Some(1)),
    ] {
        let mut cx = of_tier(node.cx(role, role), tier);
        // What it says of itself changes nothing.
        cx.claimed.custom.insert("tier".into(), "enterprise".into());
        let command = CreateKey { profile, ..creation() };
        let made = node.do_it(&cx, Mutation::Create(Box::new(command))).await;
        match expected {
            Some(stored) => {
                let found = made.unwrap().key.record.storage_profile;
                assert_eq!(found, stored, "{tier} {role} {profile:?}");
            }
            None => assert!(matches!(made, Err(Error::Denied { .. })), "{made:?}"),
        }
    }
}

#[tokio::test]
async fn a_node_without_a_backend_says_so_after_it_has_asked_for_the_right() {
    let node = Node::new().await;
    let make = async |tier| {
        let cx = of_tier(node.cx("a", "user"), tier);
        node.do_it(&cx, Mutation::Create(Box::new(hardened()))).await.map(drop)
    };
    assert!(matches!(make("free").await, Err(Error::Denied { .. })));
    for tier in ["pro", "enterprise"] {
        let refused = make(tier).await;
        assert!(matches!(refused, Err(Error::State(Reason::ProfileUnavailable))), "{refused:?}");
    }
    let plain = CreateKey { profile: None, ..creation() };
    let made = node.do_it(&node.pro(), Mutation::Create(Box::new(plain))).await.unwrap();
    assert_eq!(made.key.record.storage_profile, 1);
}

#[tokio::test]
async fn rotations_follow_the_key_and_every_version_opens() {
    let (node, device) = node(MINUTES).await;
    let id = node.make(hardened()).await;
    let mut sealed = vec![node.seal(id).await.unwrap()];
    node.do_it(&node.pro(), rotate(id, Strategy::Hot, 0)).await.unwrap();
    sealed.push(node.seal(id).await.unwrap());
    node.do_it(&node.pro(), rotate(id, Strategy::Staged { at: None }, 0)).await.unwrap();
    node.do_it(&node.pro(), rotate(id, Strategy::Staged { at: None }, 0)).await.unwrap();
    sealed.push(node.seal(id).await.unwrap());
    node.do_it(&node.pro(), rotate(id, Strategy::Scheduled { period: 3600 }, 0)).await.unwrap();
    node.clock.advance(Duration::from_secs(3600));
    // By itself: not while the backend is away, and then all the same.
    device.away();
    let now = node.clock.now();
    let all = (polykey_storage::all(), polykey_storage::Direction::Forward);
    let jobs = node.keyring.vault.scan::<JobRecord>(all.0, all.1, 10).await.unwrap();
    let (row, job) = jobs.first().unwrap();
    unavailable(node.keyring.run_job(&job.record, row, now).await);
    device.set(Mode::Up);
    node.run_due().await;
    sealed.push(node.seal(id).await.unwrap());
    let key = node.keyring.load(id).await.unwrap();
    assert_eq!((key.record.latest_version, key.record.storage_profile), (4, 2));
    for number in 1..=4 {
        let version = Version::new(number).unwrap();
        let version = node.keyring.load_version(&key, version).await.unwrap();
        let state = polykey_hsm::MaterialState::decode(&version.record.material).unwrap();
        assert!(matches!(state, polykey_hsm::MaterialState::Hardened { .. }), "{number}");
    }
    for ciphertext in &sealed {
        node.opens(ciphertext).await.unwrap();
    }
}

#[tokio::test]
async fn a_supplied_value_comes_back_and_a_repeated_request_needs_no_backend() {
    let (node, device) = node(MINUTES).await;
    let cx = node.pro();
    let value = b"a third party's credential".to_vec();
    let command = || {
        Mutation::Create(Box::new(CreateKey {
            algorithm: Algorithm::ApiKey,
            purpose: polykey_hsm::Purpose::Credential,
            value: Some(Value(Zeroizing::new(value.clone()))),
            ..hardened()
        }))
    };
    let once = Idempotency {
        key: "k".into(),
        method: "CreateKey",
        item: 0,
        request: bytes::Bytes::from_static(b"1"),
    };
    let first = node.keyring.mutate(&cx, &command(), Some(&once)).await.unwrap();
    device.away();
    let again = node.keyring.mutate(&cx, &command(), Some(&once)).await.unwrap();
    assert_eq!(first.key.id, again.key.id);
    assert_eq!(first.version.unwrap().blob, again.version.unwrap().blob);
    let export = GetKey { key: KeyName::Id(first.key.id), version: 0, export: Export::Plain };
    unavailable(node.keyring.get(&cx, &export).await);
    device.set(Mode::Up);
    match node.keyring.get(&cx, &export).await.unwrap().material {
        KeyMaterialView::Plain(bytes) => assert_eq!(*bytes, value),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_no_wrapper_of_the_node_made_is_said_to_have_none() {
    let (node, _device) = node(MINUTES).await;
    let id = node.make(hardened()).await;
    let backends = node.keyring.backends.as_ref().unwrap();
    // Another device takes the name.
    backends.add("dev", Device::new() as _, TERMS);
    let refused = node.seal(id).await;
    assert!(matches!(refused, Err(Error::State(Reason::ProfileUnavailable))), "{refused:?}");
    assert!(node.get(&node.pro(), id, 0).await.is_ok());
}

fn master(directory: &Path) -> (Arc<dyn KeyWrapper>, SlotSpec) {
    use std::os::unix::fs::PermissionsExt;
    let path = directory.join("master");
    std::fs::write(&path, generate_master_key().unwrap().as_bytes()).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let source = MasterKeySource::File(path);
    (Arc::new(LocalWrapper::open(&source).unwrap()), SlotSpec::local("main", &source))
}

#[tokio::test]
async fn a_rotation_of_the_root_asks_no_backend_and_every_key_opens_after_it_and_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (wrapper, slot) = master(directory.path());
    let store: Arc<dyn Store> = Arc::new(Memory::new().unwrap());
    let clock = Clock::manual(START);
    let device = Device::new();
    let event = || AuditEvent { action: "Test".into(), ..AuditEvent::default() };

    let caches = Arc::new(KeyCaches::new(1024));
    let custody = Custody::init(
        Arc::clone(&store),
        Arc::clone(&wrapper),
        slot,
        event(),
        Arc::clone(&caches) as _,
        clock.clone(),
    );
    let custody = custody.await.unwrap();
    let vault = Arc::clone(custody.vault());
    let node = Node::of(vault, caches, clock.clone(), with(&device, MINUTES)).await;
    let mut sealed = Vec::new();
    for n in 0..20 {
        let command = if n % 2 == 0 { hardened() } else { creation() };
        let id = node.make(command).await;
        sealed.push(node.seal(id).await.unwrap());
    }
    let asked = device.asked();
    device.away();
    custody.rotate_root(vec![Arc::clone(&wrapper)], event()).await.unwrap();
    custody.reseal(Pace { pause: Duration::ZERO, ..Pace::default() }).await.unwrap();
    assert_eq!(device.asked(), asked);
    assert_eq!(custody.status().await.unwrap().epochs, [2]);
    device.set(Mode::Up);
    for ciphertext in &sealed {
        node.opens(ciphertext).await.unwrap();
    }
    assert_eq!(device.asked(), asked + 10);
    node.keyring.trail.shutdown(Duration::from_secs(60)).await.unwrap();
    drop((node, custody));

    let caches = Arc::new(KeyCaches::new(1024));
    let open = [wrapper];
    let custody = Custody::open(store, &open, Arc::clone(&caches) as _, clock.clone());
    let custody = custody.await.unwrap();
    let vault = Arc::clone(custody.vault());
    let node = Node::of(vault, caches, clock, with(&device, MINUTES)).await;
    for ciphertext in &sealed {
        node.opens(ciphertext).await.unwrap();
    }
    assert_eq!(device.asked(), asked + 20);
}
