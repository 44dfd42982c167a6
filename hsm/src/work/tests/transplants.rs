//! Ciphertexts taken from where they belong, and changed ones: none opens.
//!
//! `POLYKEY_TRANSPLANTS` and `POLYKEY_SEED` choose another number of cases and others.

use super::*;

fn context(pairs: &[(&str, &str)]) -> Vec<u8> {
    canonical_context(&pairs.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect())
}

/// One genuine blob and what it was made with.
#[derive(Clone)]
struct Case {
    algorithm: Algorithm,
    secret: Vec<u8>,
    key_id: [u8; 16],
    version: u32,
    pair: (String, String),
    aad: Vec<u8>,
    blob: Vec<u8>,
}

impl Case {
    fn new(choices: &mut Choices) -> Self {
        let algorithm = CIPHERS[choices.below(CIPHERS.len())];
        let text = |choices: &mut Choices| {
            let len = 1 + choices.below(6);
            (0..len).map(|_| char::from(b'a' + choices.below(26) as u8)).collect::<String>()
        };
        let mut case = Self {
            algorithm,
            secret: (0..key_len(algorithm)).map(|_| choices.next() as u8).collect(),
            key_id: std::array::from_fn(|_| choices.next() as u8),
            version: 1 + choices.below(1000) as u32,
            pair: (text(choices), text(choices)),
            aad: choices.bytes(20),
            blob: vec![],
        };
        let plaintext = choices.bytes(60);
        case.blob = case.seal(&plaintext, choices.below(2) == 0);
        case
    }

    fn key(&self, algorithm: Algorithm) -> WorkingKey {
        let mut secret = self.secret.clone();
        secret.resize(key_len(algorithm), 0);
        let material = KeyMaterial::from_secret(secret).unwrap();
        WorkingKey::new(algorithm, Purpose::Encrypt, &material).unwrap()
    }

    fn context(&self) -> Vec<u8> {
        context(&[(&self.pair.0, &self.pair.1)])
    }

    fn binding<'a>(&'a self, context: &'a [u8]) -> Binding<'a> {
        Binding { key_id: self.key_id, version: self.version, context, aad: &self.aad }
    }

    fn seal(&self, plaintext: &[u8], convergent: bool) -> Vec<u8> {
        let (key, context) = (self.key(self.algorithm), self.context());
        let binding = self.binding(&context);
        match convergent {
            true => key.seal_convergent(&binding, plaintext).unwrap(),
            false => key.seal(&binding, plaintext).unwrap(),
        }
    }

    fn opens(&self, binding: &Binding<'_>, blob: &[u8]) -> bool {
        self.opens_as(self.algorithm, binding, blob)
    }

    fn opens_as(&self, algorithm: Algorithm, binding: &Binding<'_>, blob: &[u8]) -> bool {
        match self.key(algorithm).open(binding, blob) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(error, WorkError::Failed, "a failure that tells more");
                false
            }
        }
    }
}

const KINDS: [&str; 17] = [
    "another key",
    "another key id",
    "another key id, in the header too",
    "another version",
    "another version, in the header too",
    "another algorithm",
    "another algorithm, in the header too",
    "the pair of a context exchanged",
    "a byte moved between name and value",
    "another context",
    "additional data moved into the context",
    "another boundary between context and additional data",
    "cut off",
    "a bit changed",
    "bytes appended",
    "other additional data",
    "a part of another blob of the same key",
];

/// Makes one transplant of a kind; whether it opens.
fn transplant(kind: usize, case: &Case, choices: &mut Choices) -> bool {
    let home = case.context();
    let binding = case.binding(&home);
    let mut blob = case.blob.clone();
    match kind {
        0 => {
            let mut other = case.clone();
            let bit = choices.below(other.secret.len() * 8);
            other.secret[bit / 8] ^= 1 << (bit % 8);
            other.opens(&binding, &blob)
        }
        1 | 2 => {
            let mut key_id = case.key_id;
            key_id[choices.below(16)] ^= 1 << choices.below(8);
            if kind == 2 {
                blob[4..20].copy_from_slice(&key_id);
            }
            case.opens(&Binding { key_id, ..binding }, &blob)
        }
        3 | 4 => {
            let version = case.version ^ 1 << choices.below(32);
            if kind == 4 {
                blob[20..24].copy_from_slice(&version.to_be_bytes());
            }
            case.opens(&Binding { version, ..binding }, &blob)
        }
        5 | 6 => {
            let others: Vec<_> = CIPHERS.into_iter().filter(|a| *a != case.algorithm).collect();
            let other = others[choices.below(others.len())];
            if kind == 6 {
                blob[24..26].copy_from_slice(&other.code().to_be_bytes());
            }
            case.opens_as(other, &binding, &blob)
        }
        7 => {
            let (name, value) = &case.pair;
            let pair = if name == value { (name.as_str(), "") } else { (value.as_str(), &**name) };
            case.opens(&Binding { context: &context(&[pair]), ..binding }, &blob)
        }
        8 => {
            let joined = format!("{}{}", case.pair.0, case.pair.1);
            let at = choices.below(joined.len() + 1);
            let at = if at == case.pair.0.len() { 0 } else { at };
            let moved = context(&[joined.split_at(at)]);
            case.opens(&Binding { context: &moved, ..binding }, &blob)
        }
        9 => {
            let (name, value) = &case.pair;
            let other = match choices.below(4) {
                0 => vec![],
                1 => context(&[(name, value), ("zz", "")]),
                2 => context(&[(name, &format!("{value}x"))]),
                _ => context(&[(&format!("{name} "), value)]),
            };
            case.opens(&Binding { context: &other, ..binding }, &blob)
        }
        10 => match choices.below(3) {
            0 => case.opens(&Binding { context: &[], aad: &home, ..binding }, &blob),
            1 => {
                let both = [&home[..], &case.aad].concat();
                let moved = Binding { context: &both, aad: &[], ..binding };
                // Nothing has moved where there was none.
                !case.aad.is_empty() && case.opens(&moved, &blob)
            }
            _ => case.opens(&Binding { context: &case.aad, aad: &home, ..binding }, &blob),
        },
        11 => {
            let both = [&home[..], &case.aad].concat();
            let at = choices.below(both.len() + 1);
            let (context, aad) = both.split_at(if at == home.len() { at - 1 } else { at });
            case.opens(&Binding { context, aad, ..binding }, &blob)
        }
        12 => case.opens(&binding, &blob[..choices.below(blob.len())]),
        13 => {
            let at = choices.below(blob.len());
            blob[at] ^= 1 << choices.below(8);
            case.opens(&binding, &blob)
        }
        14 => {
            blob.extend((0..=choices.below(20)).map(|_| choices.next() as u8));
            case.opens(&binding, &blob)
        }
        15 => {
            let mut aad = case.aad.clone();
            match (aad.is_empty(), choices.below(3)) {
                (false, 0) => drop(aad.pop()),
                (false, 1) => aad[choices.below(case.aad.len())] ^= 1 << choices.below(8),
                _ => aad.push(choices.next() as u8),
            }
            case.opens(&Binding { aad: &aad, ..binding }, &blob)
        }
        _ => {
            // The other is as long, and differs in its last byte.
            let mut plaintext =
                case.key(case.algorithm).open(&binding, &blob).map(|p| p.to_vec()).unwrap();
            plaintext.push(choices.next() as u8);
            let one = case.seal(&plaintext, false);
            *plaintext.last_mut().unwrap() ^= 1;
            let two = case.seal(&plaintext, choices.below(2) == 0);
            let part =
                [26..58, 58..90, 90..two.len(), 26..90, 58..two.len()][choices.below(5)].clone();
            blob = one;
            blob[part.clone()].copy_from_slice(&two[part]);
            case.opens(&binding, &blob)
        }
    }
}

#[test]
fn no_transplant_opens() {
    let (cases, seed) = (number("POLYKEY_TRANSPLANTS", 100_000), number("POLYKEY_SEED", 1));
    let mut choices = Choices(seed);
    let mut made = [0_u64; KINDS.len()];
    let mut case = Case::new(&mut choices);
    for n in 0..cases {
        if n % 8 == 0 {
            case = Case::new(&mut choices);
            // The control: where it belongs, it opens.
            assert!(case.opens(&case.binding(&case.context()), &case.blob));
        }
        let kind = choices.below(KINDS.len());
        made[kind] += 1;
        let opened = transplant(kind, &case, &mut choices);
        assert!(!opened, "transplant {n} of seed {seed} opened: {}", KINDS[kind]);
    }
    for (kind, made) in KINDS.iter().zip(made) {
        println!("{made:>8} {kind}");
    }
    println!("{cases:>8} transplants of seed {seed}, 0 opened");
}

/// Every length and every bit of one blob of each cipher.
#[test]
fn no_cut_and_no_changed_bit_opens() {
    for algorithm in CIPHERS {
        let key = cipher_of(algorithm);
        for plaintext in [&b""[..], b"p", b"seventeen bytes.."] {
            let blob = key.seal(&BINDING, plaintext).unwrap();
            assert!(key.open(&BINDING, &blob).is_ok());
            for len in 0..blob.len() {
                let failed = key.open(&BINDING, &blob[..len]).unwrap_err();
                assert_eq!(failed, WorkError::Failed, "{algorithm}: cut at {len}");
            }
            for bit in 0..blob.len() * 8 {
                let mut changed = blob.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                let failed = key.open(&BINDING, &changed).unwrap_err();
                assert_eq!(failed, WorkError::Failed, "{algorithm}: bit {bit}");
            }
        }
    }
}
