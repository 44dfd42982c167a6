//! A quorum: what several wrappers wrap together, and any k of them open (Shamir's scheme, crate
//! `blahaj`).

use std::fmt;
use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use zeroize::Zeroizing;

use crate::codec::{self, Reader};
use crate::{
    BoxFuture, CryptoFailure, Deadline, KeyMaterial, KeyWrapper, SlotKind, WrapContext, WrapError,
    WrappedKey, WrapperId, cipher, random,
};

const LABEL: &str = "polykey/quorum/wrap/v1";
const ID_LABEL: &str = "polykey/quorum/id/v1";
const PARAMETERS: u8 = 1;
const SECRET_LEN: usize = 32;
/// x ‖ y.
const SHARE_LEN: usize = 1 + SECRET_LEN;

/// Several wrappers of which `threshold` must open.
///
/// Parameters: 1 ‖ threshold u8 ‖ count u8. Ciphertext: of each share the length u16 and the wrapped
/// share (32 random bytes are split; a member wraps x ‖ y), then the key, sealed under the 32 bytes
/// with a commitment and bound to everything before it, to node, purpose and slot.
pub struct QuorumWrapper {
    id: WrapperId,
    threshold: u8,
    members: Vec<Arc<dyn KeyWrapper>>,
    complete: bool,
}

impl QuorumWrapper {
    /// Most members.
    pub const MAX_MEMBERS: usize = 16;

    /// The quorum of these.
    ///
    /// # Errors
    /// [`WrapError::Config`] unless 2 ≤ threshold ≤ members ≤ 16, the members are different ones and
    /// each opens what it wraps.
    pub fn new(threshold: u8, members: Vec<Arc<dyn KeyWrapper>>) -> Result<Self, WrapError> {
        let refuse = |text: &str| Err(WrapError::Config(text.to_owned()));
        let enough = 2 <= threshold && usize::from(threshold) <= members.len();
        if !enough || members.len() > Self::MAX_MEMBERS {
            return refuse("a quorum has 2 to 16 members, and 2 to all of them open it");
        }
        if members.iter().any(|member| !member.opens() || member.kind() == SlotKind::Quorum) {
            return refuse("a member of a quorum is something that opens what it wraps by itself");
        }
        let mut ids: Vec<&[u8]> = Vec::new();
        for member in &members {
            let id = member.id().as_str().as_bytes();
            // The name of a passphrase says nothing of its words, and a token's is not known yet.
            let telling = matches!(member.kind(), SlotKind::MasterKey | SlotKind::Aws);
            if telling && ids.contains(&id) {
                return refuse("a member stands in the quorum twice");
            }
            ids.push(id);
        }
        ids.sort_unstable();
        let name = cipher::derive::<8>(&codec::join(&ids), &[], ID_LABEL, &[&[threshold]])?;
        let id = format!("quorum:{}", data_encoding::HEXLOWER.encode(name.as_slice()));
        let id = WrapperId::new(id).ok_or(CryptoFailure("unprintable wrapper id"))?;
        Ok(Self { id, threshold, members, complete: true })
    }

    /// The same, of members some of which cannot be had now: it opens, and wraps nothing, lest a
    /// quorum of fewer be made.
    #[must_use]
    pub fn incomplete(mut self) -> Self {
        self.complete = false;
        self
    }

    async fn wrap(
        &self,
        key: &KeyMaterial,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<WrappedKey, WrapError> {
        deadline.check()?;
        if !self.complete {
            let text = "a member of the quorum cannot be used now, and wrapping needs all of them";
            return Err(WrapError::Refused(text.to_owned()));
        }
        let count = u8::try_from(self.members.len()).unwrap_or(u8::MAX);
        let secret = random::secret::<SECRET_LEN>()?;
        let parameters = vec![PARAMETERS, self.threshold, count];
        let mut ciphertext = Vec::new();
        let mut used: Vec<Option<(SlotKind, Vec<u8>)>> = Vec::new();
        let dealer = blahaj::Sharks(self.threshold);
        let shares = dealer.dealer(secret.as_slice());
        for (member, dealt) in self.members.iter().zip(shares) {
            let share = KeyMaterial::from_secret(Vec::from(&dealt));
            let share = share.map_err(|e| WrapError::Config(e.to_string()))?;
            let wrapped = member.wrap_key(&share, &share_of(cx), deadline).await?;
            // The same key by two names would open two shares alone.
            let by = identity(&wrapped);
            if by.is_some() && used.contains(&by) {
                let text =
                    format!("two members of the quorum are the same key: {}", wrapped.wrapper);
                return Err(WrapError::Config(text));
            }
            used.push(by);
            let wrapped = wrapped.encode();
            let len = u16::try_from(wrapped.len());
            let len = len.map_err(|_| WrapError::Config("a share is too long".to_owned()))?;
            ciphertext.extend_from_slice(&len.to_be_bytes());
            ciphertext.extend_from_slice(&wrapped);
        }
        let sealed = bind(cx, &self.id, &parameters, &ciphertext, |context| {
            cipher::seal_committed(secret.as_slice(), LABEL, context, key.bytes())
        })?;
        ciphertext.extend_from_slice(&sealed);
        Ok(WrappedKey { kind: SlotKind::Quorum, wrapper: self.id.clone(), parameters, ciphertext })
    }

    async fn unwrap(
        &self,
        wrapped: &WrappedKey,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<KeyMaterial, WrapError> {
        deadline.check()?;
        if wrapped.kind != SlotKind::Quorum {
            return Err(WrapError::NotMine);
        }
        // Whether it is of these members is seen by its shares, so that a member more in the
        // configuration locks nobody out; `id` only decides how a failure is called.
        let named = wrapped.wrapper == self.id;
        let stored = Stored::read(wrapped).ok_or(WrapError::Broken)?;
        let Stored { threshold, shares, head, sealed } = &stored;
        let mut found: Vec<Zeroizing<Vec<u8>>> = Vec::new();
        let mut worst = None;
        {
            let cx = &share_of(cx);
            let open = |share| async move { self.share(share, cx, deadline).await };
            let mut asked: FuturesUnordered<_> = shares.iter().map(open).collect();
            while found.len() < usize::from(*threshold)
                && let Some(opened) = asked.next().await
            {
                match opened {
                    Ok(share) => found.push(share),
                    Err(WrapError::NotMine) => {}
                    Err(error) => worst = Some(worse(worst.take(), error)),
                }
            }
        }
        if found.len() < usize::from(*threshold) {
            return Err(match worst {
                Some(error) => error,
                None if found.is_empty() && named => WrapError::Broken,
                None if found.is_empty() => WrapError::NotMine,
                None => WrapError::Refused(format!(
                    "{threshold} members of the quorum are needed and {} opened: configure the others",
                    found.len()
                )),
            });
        }
        let secret = combine(*threshold, &found).ok_or(WrapError::Broken)?;
        let key = bind(cx, &wrapped.wrapper, &wrapped.parameters, head, |context| {
            cipher::open_committed(&secret, LABEL, context, sealed)
        });
        key.ok().and_then(|key| KeyMaterial::from_opened(key).ok()).ok_or(WrapError::Broken)
    }

    /// One share, by whichever member made it.
    async fn share(
        &self,
        share: &WrappedKey,
        cx: &WrapContext,
        deadline: Deadline,
    ) -> Result<Zeroizing<Vec<u8>>, WrapError> {
        let mut worst = None;
        for member in self.members.iter().filter(|member| member.kind() == share.kind) {
            match member.unwrap_key(share, cx, deadline).await {
                Ok(opened) if opened.len() == SHARE_LEN => return Ok(opened.expose_for_export()),
                Ok(_) => worst = Some(WrapError::Broken),
                Err(WrapError::NotMine) => {}
                Err(error) => worst = Some(worse(worst, error)),
            }
        }
        Err(worst.unwrap_or(WrapError::NotMine))
    }
}

/// Of two failures the one that says more about what to do: what may pass comes before what will not.
fn worse(known: Option<WrapError>, new: WrapError) -> WrapError {
    let rank = |error: &WrapError| match error {
        WrapError::NotMine => 0,
        WrapError::Broken => 1,
        WrapError::Config(_) => 2,
        WrapError::Refused(_) => 3,
        WrapError::DeadlineExceeded => 4,
        WrapError::Unavailable { .. } => 5,
    };
    match known {
        Some(known) if rank(&known) >= rank(&new) => known,
        _ => new,
    }
}

fn combine(threshold: u8, shares: &[Zeroizing<Vec<u8>>]) -> Option<Zeroizing<Vec<u8>>> {
    let mut points = Vec::with_capacity(shares.len());
    for share in shares {
        points.push(blahaj::Share::try_from(share.as_slice()).ok()?);
    }
    let secret = blahaj::Sharks(threshold).recover(points.iter()).ok().map(Zeroizing::new)?;
    (secret.len() == SECRET_LEN).then_some(secret)
}

struct Stored<'a> {
    threshold: u8,
    shares: Vec<WrappedKey>,
    /// The shares as they are stored.
    head: &'a [u8],
    sealed: &'a [u8],
}

impl<'a> Stored<'a> {
    fn read(wrapped: &'a WrappedKey) -> Option<Self> {
        let [PARAMETERS, threshold, count] = *wrapped.parameters.as_slice() else { return None };
        let sound = 2 <= threshold && threshold <= count;
        if !sound || usize::from(count) > QuorumWrapper::MAX_MEMBERS {
            return None;
        }
        let mut r = Reader::new(&wrapped.ciphertext);
        let mut shares = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            let len = usize::from(r.u16()?);
            let share = WrappedKey::decode(r.take(len)?).ok()?;
            // A quorum in a quorum would be read for as long as somebody nests it.
            (share.kind != SlotKind::Quorum).then_some(())?;
            shares.push(share);
        }
        let sealed = r.rest();
        let head = wrapped.ciphertext.len().checked_sub(sealed.len());
        let head = head.and_then(|at| wrapped.ciphertext.get(..at))?;
        (sealed.len() > cipher::COMMITTED_OVERHEAD).then_some(Self {
            threshold,
            shares,
            head,
            sealed,
        })
    }
}

/// Which key wrapped a share, as far as what it wrapped tells: the ARN of a key of AWS KMS, or the
/// wrapper's own name. A passphrase tells nothing.
fn identity(wrapped: &WrappedKey) -> Option<(SlotKind, Vec<u8>)> {
    let name = match wrapped.kind {
        SlotKind::MasterKey | SlotKind::Pkcs11 => wrapped.wrapper.as_str().as_bytes(),
        // Version 1 and a checksum of 32 bytes stand before it.
        SlotKind::Aws => wrapped.parameters.get(33..)?,
        SlotKind::Passphrase | SlotKind::Recovery | SlotKind::Quorum => return None,
    };
    Some((wrapped.kind, name.to_vec()))
}

fn share_of(cx: &WrapContext) -> WrapContext {
    WrapContext { purpose: "quorum-share", ..cx.clone() }
}

fn bind<T>(
    cx: &WrapContext,
    wrapper: &WrapperId,
    parameters: &[u8],
    shares: &[u8],
    f: impl FnOnce(&[&[u8]]) -> T,
) -> T {
    let WrapContext { node_id, purpose, slot_id } = cx;
    let wrapper =
        codec::join(&[&SlotKind::Quorum.code().to_be_bytes(), wrapper.as_str().as_bytes()]);
    f(&[node_id, purpose.as_bytes(), slot_id, &wrapper, parameters, shares])
}

impl KeyWrapper for QuorumWrapper {
    fn id(&self) -> &WrapperId {
        &self.id
    }

    fn kind(&self) -> SlotKind {
        SlotKind::Quorum
    }

    fn wrap_key<'a>(
        &'a self,
        key: &'a KeyMaterial,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
        Box::pin(self.wrap(key, cx, deadline))
    }

    fn unwrap_key<'a>(
        &'a self,
        wrapped: &'a WrappedKey,
        cx: &'a WrapContext,
        deadline: Deadline,
    ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
        Box::pin(self.unwrap(wrapped, cx, deadline))
    }
}

impl fmt::Debug for QuorumWrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuorumWrapper")
            .field("threshold", &self.threshold)
            .field("members", &self.members.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::executor::block_on;

    use super::*;
    use crate::{LocalWrapper, MasterKeySource, SecretSource};

    type Member = Arc<dyn KeyWrapper>;

    fn member(byte: u8) -> Member {
        let mut key = [byte; 32];
        key[0] = byte.wrapping_add(1);
        let source = MasterKeySource::from(SecretSource::Env("TEST".into()));
        Arc::new(LocalWrapper::of(&source, &key).unwrap())
    }

    fn quorum(threshold: u8, members: &[u8]) -> QuorumWrapper {
        QuorumWrapper::new(threshold, members.iter().map(|b| member(*b)).collect()).unwrap()
    }

    fn soon() -> Deadline {
        Deadline::after(Duration::from_secs(10))
    }

    /// A member that is away.
    struct Away(WrapperId);

    impl KeyWrapper for Away {
        fn id(&self) -> &WrapperId {
            &self.0
        }
        fn kind(&self) -> SlotKind {
            SlotKind::MasterKey
        }
        fn wrap_key<'a>(
            &'a self,
            _: &'a KeyMaterial,
            _: &'a WrapContext,
            _: Deadline,
        ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
            Box::pin(async { Err(WrapError::Unavailable { retryable: true }) })
        }
        fn unwrap_key<'a>(
            &'a self,
            wrapped: &'a WrappedKey,
            _: &'a WrapContext,
            _: Deadline,
        ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
            let mine = wrapped.wrapper == self.0;
            Box::pin(async move {
                Err(if mine {
                    WrapError::Unavailable { retryable: true }
                } else {
                    WrapError::NotMine
                })
            })
        }
    }

    #[test]
    fn conforms() {
        let subject = crate::conformance::Subject {
            wrapper: &quorum(2, &[1, 2, 3]),
            reopened: &quorum(2, &[3, 2, 1]),
            other: &quorum(2, &[4, 5, 6]),
            max_key: KeyMaterial::MAX_LEN,
            tamper_every: 1,
        };
        block_on(crate::conformance::run(&subject));
    }

    #[test]
    fn any_k_members_open_and_fewer_do_not() {
        let cx = WrapContext::root_slot([1; 16], [2; 16]);
        let secret = KeyMaterial::random(49).unwrap();
        let all = [1, 2, 3, 4];
        let wrapped = block_on(quorum(3, &all).wrap(&secret, &cx, soon())).unwrap();
        for left_out in all {
            let some: Vec<u8> = all.into_iter().filter(|b| *b != left_out).collect();
            let opened = block_on(quorum(2, &some).unwrap(&wrapped, &cx, soon())).unwrap();
            assert!(opened.bytes() == secret.bytes(), "without {left_out}");
        }
        let refused = block_on(quorum(2, &[1, 2]).unwrap(&wrapped, &cx, soon())).err();
        assert!(
            matches!(&refused, Some(WrapError::Refused(text)) if text.contains("3 members")),
            "{refused:?}"
        );
        assert_eq!(
            block_on(quorum(2, &[8, 9]).unwrap(&wrapped, &cx, soon())).err(),
            Some(WrapError::NotMine)
        );
        // A member more in the configuration changes nothing.
        let more = quorum(2, &[1, 2, 3, 9]);
        assert!(block_on(more.unwrap(&wrapped, &cx, soon())).is_ok());
    }

    #[test]
    fn a_member_that_is_away_is_told_from_one_that_is_wrong() {
        let cx = WrapContext::root_slot([1; 16], [2; 16]);
        let secret = KeyMaterial::random(32).unwrap();
        let wrapped = block_on(quorum(2, &[1, 2, 3]).wrap(&secret, &cx, soon())).unwrap();
        let away: Member = Arc::new(Away(member(2).id().clone()));
        let with = |others: &[u8]| {
            let mut members: Vec<Member> = others.iter().map(|b| member(*b)).collect();
            members.push(Arc::clone(&away));
            block_on(QuorumWrapper::new(2, members).unwrap().unwrap(&wrapped, &cx, soon()))
        };
        assert!(with(&[1, 3]).is_ok());
        assert_eq!(with(&[1]).err(), Some(WrapError::Unavailable { retryable: true }));
        // Wrapping needs all of them.
        let members = vec![member(1), Arc::clone(&away)];
        let quorum = QuorumWrapper::new(2, members).unwrap();
        let refused = block_on(quorum.wrap(&secret, &cx, soon())).err();
        assert_eq!(refused, Some(WrapError::Unavailable { retryable: true }));
    }

    #[test]
    fn a_quorum_that_lacks_a_member_opens_and_wraps_nothing() {
        let cx = WrapContext::root_slot([1; 16], [2; 16]);
        let secret = KeyMaterial::random(32).unwrap();
        let wrapped = block_on(quorum(2, &[1, 2, 3]).wrap(&secret, &cx, soon())).unwrap();
        let lacking = quorum(2, &[1, 3]).incomplete();
        assert!(block_on(lacking.unwrap(&wrapped, &cx, soon())).is_ok());
        let refused = block_on(lacking.wrap(&secret, &cx, soon())).err();
        assert!(matches!(refused, Some(WrapError::Refused(_))), "{refused:?}");
    }

    /// The same key under another name.
    struct Renamed(LocalWrapper, WrapperId);

    impl KeyWrapper for Renamed {
        fn id(&self) -> &WrapperId {
            &self.1
        }
        fn kind(&self) -> SlotKind {
            self.0.kind()
        }
        fn wrap_key<'a>(
            &'a self,
            key: &'a KeyMaterial,
            cx: &'a WrapContext,
            deadline: Deadline,
        ) -> BoxFuture<'a, Result<WrappedKey, WrapError>> {
            self.0.wrap_key(key, cx, deadline)
        }
        fn unwrap_key<'a>(
            &'a self,
            wrapped: &'a WrappedKey,
            cx: &'a WrapContext,
            deadline: Deadline,
        ) -> BoxFuture<'a, Result<KeyMaterial, WrapError>> {
            self.0.unwrap_key(wrapped, cx, deadline)
        }
    }

    #[test]
    fn one_key_by_two_names_is_no_quorum() {
        let cx = WrapContext::root_slot([1; 16], [2; 16]);
        let secret = KeyMaterial::random(32).unwrap();
        let mut key = [1; 32];
        key[0] = 2;
        let source = MasterKeySource::from(SecretSource::Env("TEST".into()));
        let same = LocalWrapper::of(&source, &key).unwrap();
        let renamed: Member = Arc::new(Renamed(same, WrapperId::new("another").unwrap()));
        let quorum = QuorumWrapper::new(2, vec![member(1), renamed]).unwrap();
        let refused = block_on(quorum.wrap(&secret, &cx, soon())).err();
        assert!(
            matches!(&refused, Some(WrapError::Config(text)) if text.contains("the same key")),
            "{refused:?}"
        );
    }

    #[test]
    fn senseless_quorums_are_refused() {
        for (k, members) in [(0, &[1, 2][..]), (1, &[1, 2]), (3, &[1, 2]), (2, &[1]), (2, &[1, 1])]
        {
            let members = members.iter().map(|b| member(*b)).collect();
            assert!(matches!(QuorumWrapper::new(k, members), Err(WrapError::Config(_))), "{k}");
        }
        let many = (1..=17).map(member).collect();
        assert!(matches!(QuorumWrapper::new(2, many), Err(WrapError::Config(_))));
        let inner: Member = Arc::new(quorum(2, &[1, 2]));
        let nested = QuorumWrapper::new(2, vec![inner, member(3)]);
        assert!(matches!(nested, Err(WrapError::Config(_))));
    }
}
