//! Data objects of a token (PKCS#11 v2.40 §4.5): small values that nobody without its PIN changes.

use cryptoki::object::{Attribute, AttributeType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;

use super::device::{Device, Fault, Open};
use super::frame::{MAX_DATA, MAX_OBJECTS, Reply, Request};
use super::{Pkcs11Token, misunderstood};
use crate::{Deadline, WrapError};

/// The `CKA_APPLICATION` of every data object that is made here.
const APPLICATION: &[u8] = b"polykey";

impl Pkcs11Token {
    /// The longest value of a data object, in bytes. Small tokens take less.
    pub const MAX_DATA: usize = MAX_DATA;

    /// What the data objects of this label hold: none or one, and one more for each [`Self::put_data`] that
    /// broke off.
    ///
    /// # Errors
    /// [`WrapError`].
    pub async fn data(&self, label: &str, deadline: Deadline) -> Result<Vec<Vec<u8>>, WrapError> {
        let request = Request::Data { label: label.to_owned(), value: None };
        match self.host.ask(&request, deadline).await? {
            Reply::Data(values) => Ok(values),
            _ => Err(misunderstood()),
        }
    }

    /// Has one data object of this label, private to those who have the PIN, hold `value`: at most
    /// [`Self::MAX_DATA`] bytes. Whatever breaks off, the old or the new one is there.
    ///
    /// # Errors
    /// [`WrapError`]; after [`WrapError::Unavailable`] and [`WrapError::DeadlineExceeded`] either may be there.
    pub async fn put_data(
        &self,
        label: &str,
        value: &[u8],
        deadline: Deadline,
    ) -> Result<(), WrapError> {
        if value.len() > MAX_DATA {
            let (found, most) = (value.len(), MAX_DATA);
            let text = format!("a data object of {found} bytes is longer than {most}");
            return Err(WrapError::Config(text));
        }
        let request = Request::Data { label: label.to_owned(), value: Some(value.to_vec()) };
        match self.host.ask(&request, deadline).await? {
            Reply::Data(_) => Ok(()),
            _ => Err(misunderstood()),
        }
    }
}

// Private: what anybody without the PIN may make is none of it.
fn template(label: &str) -> [Attribute; 5] {
    [
        Attribute::Private(true),
        Attribute::Token(true),
        Attribute::Class(ObjectClass::DATA),
        Attribute::Label(label.as_bytes().to_vec()),
        Attribute::Application(APPLICATION.to_vec()),
    ]
}

fn value(session: &Session, object: ObjectHandle) -> Result<Vec<u8>, Fault> {
    match session.get_attributes(object, &[AttributeType::Value])?.pop() {
        Some(Attribute::Value(value)) => Ok(value),
        _ => Err(Fault::Sick("C_GetAttributeValue gave no CKA_VALUE".to_owned())),
    }
}

/// In the child: does it.
pub(super) fn answer(
    device: &mut Device,
    label: &str,
    new: Option<&[u8]>,
) -> Result<Vec<Vec<u8>>, Fault> {
    device.with(|open| match new {
        Some(new) => put(open, label, new).map(|()| Vec::new()),
        None => {
            let objects = open.session.find_objects(&template(label))?;
            let read = objects.into_iter().take(MAX_OBJECTS).map(|it| value(&open.session, it));
            let mut values = read.collect::<Result<Vec<_>, _>>()?;
            values.retain(|value| value.len() <= MAX_DATA);
            Ok(values)
        }
    })
}

fn put(open: &Open, label: &str, new: &[u8]) -> Result<(), Fault> {
    let writer = open.module.open_rw_session(open.slot)?;
    let mut before = writer.find_objects(&template(label))?;
    let values = before.iter().map(|old| value(&writer, *old)).collect::<Result<Vec<_>, _>>()?;
    match values.iter().position(|value| value == new) {
        // A call that broke off has made it.
        Some(at) => drop(before.swap_remove(at)),
        None if before.len() >= MAX_OBJECTS => {
            return Err(Fault::Sick(
                "the token has eight data objects of this label that C_DestroyObject leaves where they are"
                    .to_owned(),
            ));
        }
        None => {
            let more = [Attribute::Modifiable(false), Attribute::Value(new.to_vec())];
            let made = writer.create_object(&[&template(label)[..], &more].concat())?;
            if value(&writer, made)? != new {
                let text = "a data object does not hold what it was made with";
                return Err(Fault::Sick(text.to_owned()));
            }
        }
    }
    // Never before the new one is there.
    for old in before {
        writer.destroy_object(old)?;
    }
    Ok(())
}
